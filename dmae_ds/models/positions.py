"""Fixed sin-cos positional embeddings, in two dimensions (MAE) or one (AMD), and those of other sizes."""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from dmae_ds.errors import UserError


def sincos_positions(dim: int, grid: tuple[int, int], *, span: tuple[int, int] | None = None) -> Tensor:
    """Positional embedding of a grid of patches, after a zero row for CLS (MAE, Sec. 3, as published).

    dim: number of channels, a multiple of 4; the first half encodes the column, the second the row, each as
    [sin | cos] of position / 10000^(k / (dim / 4))
    span: a larger grid over the same extent: patch i of n has the position (i + 1/2) span / n - 1/2
    Returns [1, 1 + rows * columns, dim] float32 (computed in float64).
    Raises UserError unless dim is a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sin-cos positions need a width that is a multiple of 4, found embed_dim {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    axes = [_axis_positions(*sides) for sides in zip(grid, span or grid, strict=True)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    # Two angles of [L, dim/4] -> [L, dim]
    angles = [position.reshape(-1, 1) * frequencies for position in (column, row)]
    patches = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches]).unsqueeze(0).float()


def sincos_positions_1d(dim: int, num: int) -> Tensor:
    """Positional embedding of a sequence, after a zero row for CLS (as in the published code of AMD).

    Channels 2i and 2i + 1 are sine and cosine of position / 10000^(2i / dim).
    Returns [1, 1 + num, dim] float32 (computed in float64). Raises UserError for an odd width.
    """
    if dim % 2:
        raise UserError(f"sin-cos positions need an even width, found embed_dim {dim}")
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(num, dtype=torch.float64)[:, None] * frequencies
    # Two of [num, dim / 2] -> [num, dim]
    codes = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), codes]).unsqueeze(0).float()


def _axis_positions(number: int, span: int) -> Tensor:
    return (torch.arange(number, dtype=torch.float64) + 0.5) * (span / number) - 0.5


def is_sincos(positions: Tensor, grid: tuple[int, int]) -> bool:
    """Whether the positional embeddings [1, L, D] of a grid's patches are MAE's fixed ones."""
    if positions.shape[2] % 4:
        return False
    expected = sincos_positions(positions.shape[2], grid)[:, 1:].to(positions.device)
    return torch.allclose(positions.float(), expected, rtol=0, atol=1e-4)


def stretch_positions(
    positions: Tensor, *, num_prefix: int, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """Positional embeddings of an image of another size, whose grid has the extent of the old one.

    positions: [1, num_prefix + L, D] of the grid `old`
    Returns [1, num_prefix + L', D] of the grid `new`, in the same dtype: sin-cos embeddings (MAE) are
    computed between the old places, learned ones are interpolated by timm (bicubic, antialiased).
    """
    if is_sincos(positions[:, num_prefix:], old):
        patches = sincos_positions(positions.shape[2], new, span=old)[:, 1:].to(positions)
        return torch.cat([positions[:, :num_prefix], patches], dim=1)
    return resample_abs_pos_embed(
        positions, new_size=list(new), old_size=list(old), num_prefix_tokens=num_prefix
    )
