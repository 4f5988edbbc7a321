"""The spread of a self-distilled student's targets: the number that shows its collapse."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def spread(targets: Tensor) -> Tensor:
    """Return 1 - |mean target|^2 / mean |target|^2, the share of the targets that they do not have in common.

    targets [R, D]: normalised features or probabilities of this rank's micro-batch
    Returns a float32 scalar: 0 where all rows are alike (one point, one prototype, the uniform distribution),
        at most
    1 - 1/R, where rows are orthogonal.
    """
    targets = targets.float()
    size = targets.square().sum(dim=1).mean()
    return 1 - targets.mean(dim=0).square().sum() / size.clamp(min=torch.finfo(size.dtype).tiny)
