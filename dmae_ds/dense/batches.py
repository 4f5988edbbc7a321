"""Micro-batches of dense samples. Order and draws are keyed, as for shards of images (dmae_ds/data/order.py).

Which images a global batch holds, and what training sees of them, depends on the seed alone: not on ranks,
workers, or the step at which a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.data.dense import DenseSample, DenseSet
from dmae_ds.data.loader import iterate_numbered
from dmae_ds.data.order import batch_positions, sample_ids

# (sample, epoch=) -> what training sees of it, with draws keyed by (seed, epoch, sample.key)
Transform = Callable[..., DenseSample]


@dataclass(frozen=True, kw_only=True)
class DenseBatches:
    """This rank's micro-batches of every step of a training.

    num_workers: processes that read and transform
    """

    dense_set: DenseSet
    transform: Transform
    seed: int
    global_batch: int
    micro_batch: int
    accumulation: int
    rank: int
    world_size: int
    num_workers: int
    pin_memory: bool = False

    def steps(self, start_step: int, stop_step: int) -> Iterator[list[DenseSample]]:
        """Micro-batches of steps [start_step, stop_step), `accumulation` a step.

        Raises ShardError for a sample that cannot be read.
        """
        numbers = range(start_step * self.accumulation, stop_step * self.accumulation)
        for (batch,) in iterate_numbered(
            self._load, numbers, num_workers=self.num_workers, pin_memory=self.pin_memory
        ):
            yield batch

    def _load(self, number: int) -> list[DenseSample]:
        step, accumulation_step = divmod(number, self.accumulation)
        positions = batch_positions(
            step,
            global_batch=self.global_batch,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch=self.micro_batch,
            accumulation_step=accumulation_step,
        )
        epochs, ids = sample_ids(positions, num_samples=len(self.dense_set), seed=self.seed)
        return [
            self.transform(self.dense_set[number], epoch=epoch)
            for number, epoch in zip(ids.tolist(), epochs.tolist(), strict=True)
        ]


def whole_images(
    dense_set: DenseSet, *, rank: int, world_size: int, num_workers: int
) -> Iterator[DenseSample]:
    """This rank's samples of a validation set, undistorted: rank, rank + world_size, ... by id."""
    for (sample,) in iterate_numbered(
        dense_set.__getitem__,
        range(rank, len(dense_set), world_size),
        num_workers=num_workers,
        pin_memory=False,
    ):
        yield sample


def to_device(batch: list[DenseSample], device: torch.device) -> list[DenseSample]:
    """Move the samples' tensors to a device."""
    return [
        DenseSample(
            *(item.to(device, non_blocking=True) if isinstance(item, Tensor) else item for item in sample)
        )
        for sample in batch
    ]
