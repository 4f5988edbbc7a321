"""Positional embeddings of a weights file, fitted to another grid of patches."""

from __future__ import annotations

from math import isqrt

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.positions import is_sincos, sincos_positions
from dmae_ds.weights.label import WEIGHTS, Label


def fit_positions(
    positions: Tensor, *, num_prefix: int, grid: tuple[int, int], label: Label = WEIGHTS
) -> tuple[Tensor, str]:
    """Fit positional embeddings of a square grid to another grid.

    positions: [1, num_prefix + L', D]
    Returns [1, num_prefix + L, D] in the same dtype, and a line about how it was done: sin-cos embeddings
    (MAE) are computed exactly; learned ones are interpolated by timm (bicubic, antialiased).
    Raises UserError where L' is not a square.
    """
    side = square_side(positions.shape[1] - num_prefix)
    if side is None:
        raise UserError(
            f"{label.weights} has {positions.shape[1]} positional embeddings, which are not a square of "
            f"patches after {num_prefix} for CLS; check {label.name}"
        )
    dim = positions.shape[2]
    change = f"{side}x{side} -> {grid[0]}x{grid[1]}"
    is_zero_cls = num_prefix == 1 and positions[:, 0].abs().max() <= 1e-4
    if is_zero_cls and is_sincos(positions[:, 1:], (side, side)):
        computed = sincos_positions(dim, grid).to(positions.dtype)
        return computed, f"sin-cos positions computed for this grid: {change}"
    resized = resample_abs_pos_embed(
        positions.float(), new_size=list(grid), old_size=[side, side], num_prefix_tokens=num_prefix
    )
    return resized.to(positions.dtype), f"learned positions interpolated: {change} (bicubic)"


def square_side(num_patches: int) -> int | None:
    """The side of a square grid of so many patches: 196 -> 14; None where they are not a square."""
    side = isqrt(max(num_patches, 0))
    return side if side and side * side == num_patches else None
