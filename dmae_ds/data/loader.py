"""Batches of samples for training and evaluation, from torch's DataLoader over micro-batch numbers.

A worker is given a number and works out the rest (order.py), so there is no sampler state: which images, crops and
masks a global batch holds depends on the seed alone, not on ranks, workers or where the run was resumed.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dmae_ds.data.batch import Batch, Loaded, load_eval_batch, load_train_batch
from dmae_ds.data.corrupt import CorruptLog
from dmae_ds.data.order import num_held
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.data.views import View
from dmae_ds.data.worker import end_with_parent
from dmae_ds.errors import UserError


def train_batches(
    shard_set: ShardSet | UnindexedShards,
    *,
    img_size: int,
    num_patches: int,
    crop_scale: tuple[float, float],
    flip: bool,
    seed: int,
    global_batch: int,
    micro_batch: int,
    accumulation: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    num_workers: int,
    pin_memory: bool,
    block: int = 1,
    repeat: int = 1,
    buffer_gib: float = 8.0,
    max_corrupt: int = 0,
    corrupt_log: Path | None = None,
    subset: np.ndarray | None = None,
    crop: str = "torchvision",
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    views: tuple[View, ...] = (View(),),
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step): `accumulation` a step, `micro_batch` images each.

    views: crops of each picture that stand in one batch (`Batch.views`); a mask is drawn for the first
    repeat: batch rows (crops and masks) that are taken of a picture once it is decoded; a divisor of micro_batch. Steps count views
    subset: ids of the samples that are the data, [n], None: all; an epoch is then n samples, in an order of their own
    crop: one of transforms.CROPS; augment: what is done to each view, uint8 [3, H, W], with draws keyed by its sample
    block: see order.py; buffer_gib: what this rank's workers may hold of blocks that were read
    max_corrupt: samples that may be replaced (corrupt.py), over all ranks if they write down theirs in one `corrupt_log`
    Raises ShardError for a sample that cannot be read, and above max_corrupt for one that cannot be decoded.
    """
    if global_batch != micro_batch * accumulation * world_size:
        raise UserError(
            f"global_batch {global_batch} is not micro_batch {micro_batch} x accumulation {accumulation} "
            f"x world_size {world_size} = {micro_batch * accumulation * world_size}"
        )
    if micro_batch % repeat:
        raise UserError(
            f"data.repeat {repeat} does not divide the {micro_batch} images that a rank sees at once; take another, or another optim.micro_batch"
        )
    if subset is not None and block > 1:
        raise UserError(
            f"data.block {block} reads many consecutive samples for the few that are asked for; set data.block=1"
        )
    if isinstance(shard_set, UnindexedShards):
        assert (
            subset is None and augment is None and repeat == 1
        )  # those who ask for them open indexed shards
        from dmae_ds.data.unindexed_stream import (  # webdataset takes a second to import
            StreamedBatches,
            stream_batches,
        )

        streamed = StreamedBatches(
            shard_set,
            img_size,
            num_patches,
            crop_scale,
            flip,
            views,
            seed=seed,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        num_batches = (stop_step - start_step) * accumulation
        return stream_batches(
            streamed,
            num_batches=num_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
            max_corrupt=max_corrupt,
            corrupt_log=corrupt_log,
        )
    if block > 1:
        _check_buffer(shard_set, block=block, world_size=world_size, buffer_gib=buffer_gib)
    # With blocks, every worker loads its own lanes' part of every micro-batch, so that a block is read by one worker.
    parts = max(1, min(num_workers, micro_batch // repeat)) if block > 1 else 1
    load = functools.partial(
        load_train_batch,
        reader=SampleReader(
            shard_set, block=block, buffer_bytes=int(buffer_gib * 2**30) // max(1, num_workers)
        ),
        img_size=img_size,
        num_patches=num_patches,
        crop_scale=crop_scale,
        flip=flip,
        seed=seed,
        global_batch=global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        parts=parts,
        repeat=repeat,
        subset=subset,
        crop=crop,
        augment=augment,
        views=views,
    )
    numbers = range(start_step * accumulation * parts, stop_step * accumulation * parts)
    log = CorruptLog(corrupt_log, max_corrupt=max_corrupt)
    return _iterate(load, numbers, num_workers=num_workers, pin_memory=pin_memory, parts=parts, log=log)


def _check_buffer(shard_set: ShardSet, *, block: int, world_size: int, buffer_gib: float) -> None:
    """Blocks that do not fit would be read again for every few of their samples."""
    num_bytes = sum(shard.bytes for shard in shard_set.shards) / shard_set.num_samples
    needed_gib = num_held(shard_set.num_samples, block) * num_bytes / world_size / 2**30
    if needed_gib > buffer_gib:
        raise UserError(
            f"data.block {block} needs about {needed_gib:.1f} GiB a rank for the samples it has read, data.buffer_gib is "
            f"{buffer_gib:g}; take a smaller block or more ranks, or raise data.buffer_gib"
        )


def eval_batches(
    shard_set: ShardSet,
    *,
    img_size: int,
    crop_pct: float,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    limit: int | None = None,
    subset: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Every sample once (or the first `limit`), in id order: this rank's are rank, rank + world_size, ...

    subset: ids [n] of the samples that are the data, in their order; None: all
    The last batch may be short, and ranks may differ by one sample. Raises ShardError as train_batches does.
    """
    every = range(shard_set.num_samples) if subset is None else subset.tolist()
    ids = every[:limit][rank::world_size]
    load = functools.partial(
        load_eval_batch,
        reader=SampleReader(shard_set),
        ids=ids,
        batch_size=batch_size,
        img_size=img_size,
        crop_pct=crop_pct,
    )
    numbers = range(math.ceil(len(ids) / batch_size))
    return _iterate(load, numbers, num_workers=num_workers, pin_memory=False)


@dataclass(frozen=True)
class _NumberedBatches(Dataset):
    """Number -> batch. A ShardError is returned, not raised: DataLoader would turn it into the text of a traceback."""

    load: Callable[[int], Loaded]

    def __getitem__(self, number: int) -> Loaded | ShardError:
        try:
            return self.load(number)
        except ShardError as error:
            return ShardError(str(error))  # of the plain class, which can be pickled


def _iterate(
    load: Callable[[int], Loaded],
    numbers: range,
    *,
    num_workers: int,
    pin_memory: bool,
    parts: int = 1,
    log: CorruptLog = CorruptLog(None, max_corrupt=0),
) -> Iterator[Batch]:
    loader = DataLoader(
        _NumberedBatches(load),
        batch_size=None,  # an item is a whole batch, or a part of one
        sampler=numbers,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=pin_memory and parts == 1,
        generator=torch.Generator(),  # else DataLoader draws from, and so advances, the global one
    )
    items = iter(loader)
    while group := list(itertools.islice(items, parts)):
        for item in group:
            if isinstance(item, ShardError):
                raise item
            log.add(item.corrupt)
        batch = Batch.join([item.batch for item in group])
        yield batch.pin_memory() if pin_memory and parts > 1 else batch
