"""How much the targets of a self-distilled student differ: the number by which its collapse is seen."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def spread(targets: Tensor) -> Tensor:
    """1 - |mean target|^2 / mean |target|^2, the share of the targets that is not common to all of them.

    targets [R, D], of this rank's micro-batch: normalised features, or probabilities
    Returns a scalar, float32: 0 where all rows are alike, be they one point, one prototype or the uniform distribution;
    at most 1 - 1/R, where rows are orthogonal.
    """
    targets = targets.float()
    size = targets.square().sum(dim=1).mean()
    return 1 - targets.mean(dim=0).square().sum() / size.clamp(min=torch.finfo(size.dtype).tiny)
