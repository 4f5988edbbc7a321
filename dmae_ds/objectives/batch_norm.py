"""Batch normalisation over the pictures of all ranks, by nothing but the batch's own statistics.

torch's SyncBatchNorm refuses CPUs, and running statistics would be one more state to keep, for heads that nobody evaluates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.distributed import collectives

EPSILON = 1e-5  # torch's default


class GlobalBatchNorm(nn.Module):
    """[..., N, D] -> the same shape: every channel with mean 0 and variance 1 over the N rows of all ranks, which have equally many.

    Leading axes are batches of their own (views), so that one exchange serves them all. affine: learned scale and shift after it.
    Statistics are taken in float32 at least. Collective, in backward too.
    """

    def __init__(self, dim: int, *, affine: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, rows: Tensor) -> Tensor:
        exact = rows if rows.dtype == torch.float64 else rows.float()
        # [..., 1, D]; two exchanges, for E[x^2] - E[x]^2 loses the digits that matter
        centred = exact - collectives.mean_over_ranks_with_gradient(exact.mean(dim=-2, keepdim=True))
        variance = collectives.mean_over_ranks_with_gradient(centred.square().mean(dim=-2, keepdim=True))
        normalized = centred * (variance + EPSILON).rsqrt()
        if self.weight is not None:
            normalized = normalized * self.weight.to(exact.dtype) + self.bias.to(exact.dtype)
        return normalized.to(rows.dtype)
