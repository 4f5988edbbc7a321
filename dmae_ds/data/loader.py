"""Batches of samples for training and evaluation, from torch's DataLoader over numbers of micro-batches.

A worker receives a number and computes the rest (order.py), so there is no sampler state: which images, crops
and masks a global batch holds depends on the seed alone, not on ranks, workers or the step at which the run
was resumed.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dmae_ds.data.batch import Batch, Loaded, load_eval_batch, load_train_batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.corrupt import CorruptLog
from dmae_ds.data.order import num_held
from dmae_ds.data.pixels import RGB, PixelFormat
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.data.worker import end_with_parent
from dmae_ds.errors import UserError
from dmae_ds.output.units import GIB

WORKER_ENDS_S = 2.0  # from the loss of a worker's connection to its end, at most


def train_batches(
    shard_set: ShardSet | UnindexedShards,
    spec: BatchSpec,
    *,
    start_step: int,
    stop_step: int,
    num_workers: int,
    pin_memory: bool,
    buffer_gib: float = 8.0,
    max_corrupt: int = 0,
    corrupt_log: Path | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step), as `spec` describes them.

    buffer_gib: memory for blocks that this rank's workers have read
    max_corrupt: samples that may be replaced (corrupt.py); over all ranks if they share one `corrupt_log`
    Raises UserError for contradictory settings; ShardError for a sample that cannot be read, and above
    max_corrupt for one that cannot be decoded.
    """
    spec.check()
    log = CorruptLog(corrupt_log, max_corrupt=max_corrupt)
    if isinstance(shard_set, UnindexedShards):
        from dmae_ds.data.unindexed_stream import stream_batches  # webdataset takes a second to import

        return stream_batches(
            shard_set,
            spec,
            start_step=start_step,
            stop_step=stop_step,
            num_workers=num_workers,
            pin_memory=pin_memory,
            log=log,
        )
    if spec.block > 1:
        _check_buffer(shard_set, spec, buffer_gib=buffer_gib)
    # With blocks, every worker loads its own lanes' piece of every micro-batch, so that one worker reads a
    # block.
    num_pieces = max(1, min(num_workers, spec.micro_batch // spec.repeat)) if spec.block > 1 else 1
    buffer_bytes = int(buffer_gib * GIB) // max(1, num_workers)
    reader = SampleReader(shard_set, block=spec.block, buffer_bytes=buffer_bytes)
    load = functools.partial(load_train_batch, reader=reader, spec=spec, num_pieces=num_pieces)
    num_per_step = spec.accumulation * num_pieces
    numbers = range(start_step * num_per_step, stop_step * num_per_step)
    return _iterate(
        load, numbers, num_workers=num_workers, pin_memory=pin_memory, num_pieces=num_pieces, log=log
    )


def _check_buffer(shard_set: ShardSet, spec: BatchSpec, *, buffer_gib: float) -> None:
    """Raise UserError if the blocks do not fit: they would be read again for every few of their samples."""
    bytes_per_sample = sum(shard.bytes for shard in shard_set.shards) / shard_set.num_samples
    num_held_per_rank = num_held(shard_set.num_samples, spec.block) / spec.world_size
    needed_gib = num_held_per_rank * bytes_per_sample / GIB
    if needed_gib > buffer_gib:
        raise UserError(
            f"data.block {spec.block} needs about {needed_gib:.1f} GiB a rank for the samples it has read, "
            f"data.buffer_gib is {buffer_gib:g}; use a smaller block or more ranks, or raise data.buffer_gib"
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
    pin_memory: bool = False,
    limit: int | None = None,
    subset: np.ndarray | None = None,
    pixels: PixelFormat = RGB,
) -> Iterator[Batch]:
    """Every sample once (or the first `limit`), in id order; this rank's are rank, rank + world_size, ...

    pin_memory: for copies to a GPU that do not wait
    subset: ids [n] of the samples that are used, in their order; None: all
    The last batch may be short, and ranks may differ by one sample. Raises ShardError as train_batches does.
    """
    all_ids = range(shard_set.num_samples) if subset is None else subset.tolist()
    ids = all_ids[:limit][rank::world_size]
    load = functools.partial(
        load_eval_batch,
        reader=SampleReader(shard_set),
        ids=ids,
        batch_size=batch_size,
        img_size=img_size,
        crop_pct=crop_pct,
        pixels=pixels,
    )
    numbers = range(math.ceil(len(ids) / batch_size))
    return _iterate(load, numbers, num_workers=num_workers, pin_memory=pin_memory)


@dataclass(frozen=True)
class _NumberedBatches(Dataset):
    """Batches by their number.

    A ShardError is returned, not raised: DataLoader would turn it into the text of a traceback.
    """

    load: Callable[[int], object]

    def __getitem__(self, number: int) -> object | ShardError:
        try:
            return self.load(number)
        except ShardError as error:
            return ShardError(str(error))  # of the plain class, which can be pickled


def iterate_numbered(
    load: Callable[[int], object], numbers: range, *, num_workers: int, pin_memory: bool, num_pieces: int = 1
) -> Iterator[list]:
    """Load what `load` returns for each number in workers: lists of `num_pieces`, in order.

    Raises the ShardError that a worker met.
    """
    loader = DataLoader(
        _NumberedBatches(load),
        batch_size=None,  # an item is a whole batch, or a piece of one
        sampler=numbers,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else DataLoader draws from, and so advances, the global one
    )
    items = iter(loader)
    while group := _receive(items, num_pieces):
        for item in group:
            if isinstance(item, ShardError):
                raise item
        yield group


def _iterate(
    load: Callable[[int], Loaded],
    numbers: range,
    *,
    num_workers: int,
    pin_memory: bool,
    num_pieces: int = 1,
    log: CorruptLog | None = None,
) -> Iterator[Batch]:
    """Load numbered batches in workers, and join every `num_pieces` of them into one."""
    log = log or CorruptLog(None, max_corrupt=0)
    pin_pieces = pin_memory and num_pieces == 1
    for group in iterate_numbered(
        load, numbers, num_workers=num_workers, pin_memory=pin_pieces, num_pieces=num_pieces
    ):
        for item in group:
            log.add(item.corrupt)
        batch = Batch.join([item.batch for item in group])
        yield batch.pin_memory() if pin_memory and num_pieces > 1 else batch


def _receive(items: Iterator[Loaded | ShardError], num: int) -> list[Loaded | ShardError]:
    """Take the next `num` items, or those that are left."""
    try:
        return list(itertools.islice(items, num))
    except (ConnectionError, EOFError) as error:
        # A worker ended while it handed over a batch. torch's handler of SIGCHLD says which, and how.
        time.sleep(WORKER_ENDS_S)
        raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}") from None
