"""Batches of samples for training and evaluation, from torch's DataLoader over micro-batch numbers.

A worker is given a number and works out the rest (order.py), so there is no sampler state: which images, crops and
masks a global batch holds depends on the seed alone, not on ranks, workers or where the run was resumed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dmae_ds.data.order import batch_positions, sample_ids
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.transforms import CROP_STREAM, MASK_STREAM, decode, eval_view, sample_rng, train_view
from dmae_ds.errors import UserError


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor  # [N, 3, H, W] uint8
    noise: torch.Tensor | None  # [N, L] float32 in [0, 1), one draw a patch for the mask; None in evaluation
    labels: torch.Tensor  # [N] int64
    sample_ids: torch.Tensor  # [N] int64
    epochs: torch.Tensor  # [N] int64

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":  # DataLoader calls it
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else function(value) for name, value in fields.items()})


def train_batches(
    shard_set: ShardSet,
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
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step): `accumulation` a step, `micro_batch` images each.

    Raises ShardError for a sample that cannot be read or decoded.
    """
    if global_batch != micro_batch * accumulation * world_size:
        raise UserError(
            f"global_batch {global_batch} is not micro_batch {micro_batch} x accumulation {accumulation} "
            f"x world_size {world_size} = {micro_batch * accumulation * world_size}"
        )
    load = functools.partial(
        _load_train_batch,
        reader=SampleReader(shard_set),
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
    )
    numbers = range(start_step * accumulation, stop_step * accumulation)
    return _iterate(load, numbers, num_workers=num_workers, pin_memory=pin_memory)


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
) -> Iterator[Batch]:
    """Every sample once (or the first `limit`), in id order: this rank's are rank, rank + world_size, ...

    The last batch may be short, and ranks may differ by one sample. Raises ShardError as train_batches does.
    """
    num_samples = shard_set.num_samples if limit is None else min(limit, shard_set.num_samples)
    ids = range(rank, num_samples, world_size)
    load = functools.partial(
        _load_eval_batch,
        reader=SampleReader(shard_set),
        ids=ids,
        batch_size=batch_size,
        img_size=img_size,
        crop_pct=crop_pct,
    )
    numbers = range(math.ceil(len(ids) / batch_size))
    return _iterate(load, numbers, num_workers=num_workers, pin_memory=False)


def _load_train_batch(
    number: int,
    *,
    reader: SampleReader,
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
) -> Batch:
    step, accumulation_step = divmod(number, accumulation)
    positions = batch_positions(
        step,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation_step=accumulation_step,
    )
    epochs, ids = sample_ids(positions, num_samples=reader.shard_set.num_samples, seed=seed)
    images = np.empty((micro_batch, 3, img_size, img_size), np.uint8)
    noise = np.empty((micro_batch, num_patches), np.float32)
    labels = np.empty(micro_batch, np.int64)
    for row, (epoch, sample_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        sample = reader.read(sample_id)
        crop_rng = sample_rng(seed, epoch, sample_id, CROP_STREAM)
        images[row] = train_view(decode(sample), crop_rng, img_size=img_size, crop_scale=crop_scale, flip=flip)
        noise[row] = sample_rng(seed, epoch, sample_id, MASK_STREAM).random(num_patches, dtype=np.float32)
        labels[row] = sample.label
    return Batch(*map(torch.from_numpy, (images, noise, labels, ids, epochs)))


def _load_eval_batch(
    number: int, *, reader: SampleReader, ids: range, batch_size: int, img_size: int, crop_pct: float
) -> Batch:
    batch_ids = ids[number * batch_size : (number + 1) * batch_size]
    samples = [reader.read(sample_id) for sample_id in batch_ids]
    images = np.stack([eval_view(decode(sample), img_size=img_size, crop_pct=crop_pct) for sample in samples])
    return Batch(
        images=torch.from_numpy(images),
        noise=None,
        labels=torch.tensor([sample.label for sample in samples]),
        sample_ids=torch.tensor(batch_ids),
        epochs=torch.zeros(len(batch_ids), dtype=torch.int64),
    )


@dataclass(frozen=True)
class _NumberedBatches(Dataset):
    """Number -> batch. A ShardError is returned, not raised: DataLoader would turn it into the text of a traceback."""

    load: Callable[[int], Batch]

    def __getitem__(self, number: int) -> Batch | ShardError:
        try:
            return self.load(number)
        except ShardError as error:
            return error


def _iterate(
    load: Callable[[int], Batch], numbers: range, *, num_workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        _NumberedBatches(load),
        batch_size=None,  # an item is a whole batch
        sampler=numbers,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else DataLoader draws from, and so advances, the global one
    )
    for item in loader:
        if isinstance(item, ShardError):
            raise item
        yield item
