"""Masks of the objective `features`: which patches, and the mask token in their place in the encoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.masking import keep_random

# BEiT's block-wise masking: a rectangle has at least 16 of 196 patches, and a ratio of sides of .3 to 1 / .3.
SMALLEST, NARROWEST = 16 / 196, 0.3


def num_masked(num_patches: int, ratio: float) -> int:
    """Return how many patches are masked, rounded down. Raises UserError where all or none are."""
    masked = int(num_patches * ratio)
    if not 0 < masked < num_patches:
        raise UserError(
            f"objective.mask.ratio {ratio:g} masks {masked} of {num_patches} patches; between 1 and "
            f"{num_patches - 1} must be masked"
        )
    return masked


def draw_mask(noise: Tensor, masked: int, *, shape: str, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return ids_keep [N, L - masked] and ids_masked [N, masked].

    noise: [N, L] float, from which all is drawn; shape: `random` or `block`
    """
    if shape == "random":
        return keep_random(noise, noise.shape[1] - masked)
    order = block_order(noise, masked, grid)
    return order[:, masked:], order[:, :masked]


def block_order(noise: Tensor, masked: int, grid: tuple[int, int]) -> Tensor:
    """Return the patches in the order in which rectangles cover them, [N, L] int64 (BEiT, Sec. 2.3).

    Rectangle j is drawn from four numbers of the noise: its area from 16 of 196 patches up to `masked`, its
    ratio of sides, its place. Patches of one rectangle, and those of none, are in the order of the noise. The
    first `masked` are a union of rectangles, of which the last one may be cut.
    """
    length = noise.shape[1]
    rows, columns = grid
    area, ratio, top, left = noise[:, : length // 4 * 4].unflatten(1, (-1, 4)).unbind(2)  # [N, R] each
    smallest = min(max(1.0, SMALLEST * length), masked)
    area = smallest + area * (masked - smallest)
    ratio = torch.exp((2 * ratio - 1) * math.log(1 / NARROWEST))
    height = (area * ratio).sqrt().round().clamp(1, rows)
    width = (area / ratio).sqrt().round().clamp(1, columns)
    top, left = ((rows - height + 1) * top).floor(), ((columns - width + 1) * left).floor()
    row = torch.arange(rows, device=noise.device)[:, None].expand(grid).flatten()
    column = torch.arange(columns, device=noise.device).expand(grid).flatten()
    # [N, R, L]: whether a rectangle covers a patch
    covers = (row >= top[..., None]) & (row < (top + height)[..., None])
    covers &= (column >= left[..., None]) & (column < (left + width)[..., None])
    numbers = torch.arange(covers.shape[1], device=noise.device)[:, None]
    first = torch.where(covers, numbers, covers.shape[1]).amin(dim=1)  # [N, L]
    return torch.argsort(first + noise, dim=1, stable=True)  # the noise is below 1


class MaskToken(nn.Module):
    """A trained token that takes the place of masked patches, before positions are added."""

    def __init__(self, embed_dim: int, generator: torch.Generator):
        super().__init__()
        self.token = nn.Parameter(torch.empty(embed_dim))
        nn.init.normal_(self.token, std=0.02, generator=generator)

    def forward(self, patches: Tensor, is_masked: Tensor) -> Tensor:
        """Replace projected patches [N, L, D] where is_masked [N, L] bool."""
        return torch.where(is_masked[..., None], self.token.to(patches.dtype), patches)
