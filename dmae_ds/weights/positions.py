"""Positional embeddings of a weights file, fitted to another grid of patches."""

from __future__ import annotations

from math import isqrt

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.positions import sincos_positions


def fit_positions(positions: Tensor, *, num_prefix: int, grid: tuple[int, int]) -> tuple[Tensor, str]:
    """Position codes [1, num_prefix + L', D] of a square grid, for another grid: [1, num_prefix + L, D], and how it was done.

    Sin-cos codes (MAE) are computed anew, exactly; learned ones are interpolated by timm (bicubic, antialiased).
    Raises UserError where L' is no square.
    """
    side = square_side(positions.shape[1] - num_prefix)
    if side is None:
        raise UserError(
            f"teacher.weights has {positions.shape[1]} position codes, which are no square of patches after {num_prefix} for CLS; check teacher.name"
        )
    source, dim = (side, side), positions.shape[2]
    if (
        num_prefix == 1
        and dim % 4 == 0
        and torch.allclose(positions.float(), sincos_positions(dim, source), rtol=0, atol=1e-4)
    ):
        return sincos_positions(dim, grid).to(
            positions.dtype
        ), f"sin-cos positions computed anew: {side}x{side} -> {grid[0]}x{grid[1]}"
    resized = resample_abs_pos_embed(
        positions.float(), new_size=list(grid), old_size=list(source), num_prefix_tokens=num_prefix
    )
    return resized.to(
        positions.dtype
    ), f"learned positions interpolated: {side}x{side} -> {grid[0]}x{grid[1]} (bicubic)"


def square_side(num_patches: int) -> int | None:
    """196 -> 14; None where it is no square."""
    side = isqrt(max(num_patches, 0))
    return side if side and side * side == num_patches else None
