"""The pictures of a recipe as its objective wants them: views, augmentation and crops from the recipe, places in the order from the world."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import train_batches
from dmae_ds.data.rand_augment import RandAugment
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.distributed.world import World
from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective


def training_batches(
    config: RunConfig,
    objective: Objective,
    shards: ShardSet | UnindexedShards,
    *,
    world: World,
    device: torch.device,
    micro_batch: int,
    accumulation: int,
    start_step: int = 0,
    stop_step: int,
    max_corrupt: int = 0,
    corrupt_log: Path | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step), on the host (data/loader.py says what is raised)."""
    data, student = config.data, objective.student
    img_size = student.grid[0] * student.patch_size
    augment = None
    if objective.rand_augment is not None:
        augment = RandAugment(objective.rand_augment, img_size=img_size, mean=data.mean)
    spec = BatchSpec(
        img_size=img_size,
        num_patches=student.num_patches,
        crop_scale=data.crop_scale,
        flip=data.flip,
        seed=config.run.seed,
        global_batch=config.optim.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=world.rank,
        world_size=world.size,
        views=objective.views,
        repeat=data.repeat,
        augment=augment,
        block=data.block,
    )
    return train_batches(
        shards,
        spec,
        start_step=start_step,
        stop_step=stop_step,
        num_workers=data.num_workers,
        pin_memory=device.type == "cuda",
        buffer_gib=data.buffer_gib,
        max_corrupt=max_corrupt,
        corrupt_log=corrupt_log,
    )


def masked_batches(
    batches: Iterable[Batch], prepare: Callable, normalize: torch.nn.Module, device: torch.device
) -> Iterator[tuple[Batch, PatchBatch]]:
    """Move each micro-batch to the device and draw its mask there."""
    for batch in copied(batches, device):
        yield batch, prepare(batch, normalize)


def copied(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Each micro-batch on the device. To a GPU it travels on a stream of its own, from pinned memory: while the step before it is still computed."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for pinned in batches:
        with torch.cuda.stream(stream):
            batch = pinned.to(device)
        torch.cuda.current_stream(device).wait_stream(stream)
        batch.used_on(torch.cuda.current_stream(device))
        yield batch
