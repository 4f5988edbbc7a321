"""Feature-richness distillation of a detector (Du et al., NeurIPS 2021), as in G2SD's supplement, 1.2.

    L = L_GT + w * (alpha * L_FPN + beta * L_head)

The teacher's region proposals say where its features are rich: at each level of the pyramid the mask m [N, h,
w] is the largest objectness (sigmoid) of the anchors at a place. L_FPN compares the pyramids under this mask,
L_head the objectness. w rises linearly from 0 in the first steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def richness_masks(objectness: Sequence[Tensor]) -> list[Tensor]:
    """Masks [N, 1, h, w] from a teacher's objectness logits [N, A, h, w] of each level."""
    return [logits.float().sigmoid().amax(dim=1, keepdim=True) for logits in objectness]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of values [N, C, h, w] under a mask [N, 1, h, w], divided by the sum of the mask."""
    return (values * mask).sum() / mask.sum()


def pyramid_loss(adapted: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """L_FPN: squared differences of pyramids [N, C, h, w], summed over channels and levels."""
    terms = [
        masked_sum((mine.float() - its.float()).square(), mask)
        for mine, its, mask in zip(adapted, teacher, masks, strict=True)
    ]
    return torch.stack(terms).sum()


def objectness_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """L_head: binary cross-entropy of objectness logits [N, A, h, w], summed over anchors and levels."""
    terms = [
        masked_sum(
            F.binary_cross_entropy_with_logits(mine.float(), its.float().sigmoid(), reduction="none"), mask
        )
        for mine, its, mask in zip(student, teacher, masks, strict=True)
    ]
    return torch.stack(terms).sum()


def warmup_weight(step: Tensor, warmup_steps: int) -> Tensor:
    """Weight of both terms in a step, a scalar counted from 0: step / warmup_steps, then 1."""
    return (step / warmup_steps).clamp(max=1) if warmup_steps else torch.ones_like(step)


class Adapters(nn.ModuleList):
    """One 3x3 convolution a level, from the student's pyramid to the teacher's. They are not kept."""

    def __init__(self, num_levels: int, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1) for _ in range(num_levels))

    def forward(self, pyramid: Sequence[Tensor]) -> list[Tensor]:
        """The student's levels [N, C, h, w] in the teacher's width [N, C_t, h, w]."""
        return [convolution(level) for convolution, level in zip(self, pyramid, strict=True)]
