"""Masking of patches (MAE, Sec. 3), and the masked batch that teacher and student share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.errors import UserError


def num_visible(
    num_patches: int, mask_ratio: float, patch_count: str, *, key: str = "objective.mask_ratio"
) -> int:
    """Number of visible patches, K = L * (1 - mask_ratio).

    patch_count: `round`, as in the paper, or `int`, truncated as in the published code
    key: the recipe's key that holds the ratio, for messages
    Raises UserError where no patch would stay visible, or none be masked.
    """
    exact = num_patches * (1 - mask_ratio)
    kept = int(exact) if patch_count == "int" else round(exact)
    if not 0 < kept < num_patches:
        raise UserError(
            f"{key} {mask_ratio:g} keeps {kept} of {num_patches} patches (patch_count: "
            f"{patch_count}); between 1 and {num_patches - 1} must stay visible"
        )
    return kept


def keep_random(noise: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Keep a random subset of patches (MAE, Sec. 3).

    noise: [N, L] float, one draw a patch; the `kept` smallest stay, ties by position
    Returns ids_keep [N, K] and ids_masked [N, L - K], both in the order of the noise.
    """
    shuffled = torch.argsort(noise, dim=1, stable=True)
    return shuffled[:, :kept], shuffled[:, kept:]


def gather_patches(patches: Tensor, ids: Tensor) -> Tensor:
    """Select patches [N, K, ...] by ids [N, K] from patches [N, L, ...]."""
    return patches[torch.arange(len(ids), device=ids.device)[:, None], ids]


@dataclass
class PatchBatch:
    """A batch with its mask drawn, on the device; teacher and student see the same `visible`.

    visible [N, K, P, P, C], masked [N, L - K, P, P, C]: normalised float pixels of ids_keep and ids_masked
    """

    visible: Tensor
    masked: Tensor
    ids_keep: Tensor
    ids_masked: Tensor
