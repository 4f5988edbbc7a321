"""Batch norm over the images of all ranks, on any device (torch's SyncBatchNorm runs on GPUs alone).

A rank has few images of a dense task, too few for statistics. With it, ranks that share a batch compute what
one rank with the whole batch computes; micro-batches that are accumulated keep statistics of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.distributed.collectives import mean_over_ranks_with_gradient, world_size


class BatchNormOverRanks(nn.BatchNorm2d):
    """torch's BatchNorm2d with statistics of all ranks' images, of which every rank has equally many."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise [N, C, H, W]; in eval mode and with one rank by torch's own."""
        if not self.training or world_size() == 1:
            return super().forward(maps)
        values = maps.float()
        mean = mean_over_ranks_with_gradient(values.mean(dim=(0, 2, 3)))  # [C]
        centred = values - mean[:, None, None]
        variance = mean_over_ranks_with_gradient(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count = maps.numel() // maps.shape[1] * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(1, count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(maps.dtype)


def norm_over_ranks(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm2d of a module by one over all ranks. Returns the module."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, BatchNormOverRanks(child.num_features, child.eps, child.momentum))
        else:
            norm_over_ranks(child)
    return module
