"""The way of a batch to the training loop: loader -> device -> mask -> teacher. `input_stream` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from dmae_ds.config.family import objectives_of
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import train_batches
from dmae_ds.data.order import share_ids
from dmae_ds.data.pixels import RGB, PixelFormat
from dmae_ds.data.rand_augment import RandAugment
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective
from dmae_ds.train.networks import Teacher
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.step_timer import StepTimer


def input_stream(
    preflight: Preflight,
    objective: Objective,
    teacher: Teacher,
    *,
    start_step: int,
    device: torch.device,
    timer: StepTimer,
) -> Iterator[tuple[Batch, PatchBatch, dict[str, Tensor]]]:
    """Stream this rank's micro-batches from start_step to the end of the run, with their teacher's features.

    timer: gets the time that is spent waiting for data and for the teacher
    Yields (batch, its patches, {tap: features}), all on the device. data/loader.py describes what is raised.
    """
    config = preflight.config
    spec = batch_spec(
        config,
        objective,
        world=preflight.world,
        micro_batch=preflight.micro_batch,
        accumulation=preflight.accumulation,
        replay=preflight.replay,
        num_samples=preflight.shards.num_samples,
    )
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    loaded = training_batches(
        config,
        preflight.shards,
        spec,
        start_step=start_step,
        stop_step=preflight.num_steps,
        pin_memory=device.type == "cuda",
        max_corrupt=config.data.max_corrupt,
        corrupt_log=preflight.run_dir / "corrupt.jsonl",
    )
    on_device = copied(timer.waiting("data", loaded), device)
    masked = masked_batches(on_device, objective.prepare, normalize)
    with_features = teacher.stream(masked)
    return timer.waiting("teacher", with_features)


def batch_spec(
    config: RunConfig,
    objective: Objective,
    *,
    world: World,
    micro_batch: int,
    accumulation: int,
    replay: int | None = None,
    num_samples: int | None = None,
) -> BatchSpec:
    """Settings of the batches: crops from the recipe, views from the objective, the rank from the world.

    replay: as `BatchSpec.replay`; num_samples: of data.train, of which data.share are taken; None: all are
    """
    data, student = config.data, objective.student
    img_size = student.grid[0] * student.patch_size
    augment = subset = None
    if num_samples is not None and data.share < 1:
        subset = share_ids(num_samples, data.share)
    if objective.rand_augment is not None:
        if PixelFormat.of(data) != RGB:
            name = objectives_of(config)[0].name
            raise UserError(
                f"objective {name} augments 8-bit RGB, and images have {len(data.mean)} channels of "
                f"{data.bits} bits; set objective.augment.rand_augment=null"
            )
        augment = RandAugment(objective.rand_augment, img_size=img_size, mean=data.mean)
    return BatchSpec(
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
        subset=subset,
        block=data.block,
        pixels=PixelFormat.of(data),
        replay=replay,
    )


def training_batches(
    config: RunConfig,
    shards: ShardSet | UnindexedShards,
    spec: BatchSpec,
    *,
    start_step: int = 0,
    stop_step: int,
    pin_memory: bool,
    max_corrupt: int = 0,
    corrupt_log: Path | None = None,
) -> Iterator[Batch]:
    """Load this rank's micro-batches of steps [start_step, stop_step), on the host."""
    return train_batches(
        shards,
        spec,
        start_step=start_step,
        stop_step=stop_step,
        num_workers=config.data.num_workers,
        pin_memory=pin_memory,
        buffer_gib=config.data.buffer_gib,
        max_corrupt=max_corrupt,
        corrupt_log=corrupt_log,
    )


def copied(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each micro-batch to the device.

    To a GPU it is copied from pinned memory on a stream of its own, while the previous step is still being
    computed.
    """
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


def masked_batches(
    batches: Iterable[Batch],
    prepare: Callable[[Batch, torch.nn.Module], PatchBatch],
    normalize: torch.nn.Module,
) -> Iterator[tuple[Batch, PatchBatch]]:
    """Add to each micro-batch its normalized patches, divided by the mask that is drawn on the device."""
    for batch in batches:
        yield batch, prepare(batch, normalize)
