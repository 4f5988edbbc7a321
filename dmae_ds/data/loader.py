"""Batches of samples for training and evaluation, from torch's DataLoader over micro-batch numbers.

A worker is given a number and works out the rest (order.py), so there is no sampler state: which images, crops and
masks a global batch holds depends on the seed alone, not on ranks, workers or where the run was resumed.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dmae_ds.data.corrupt import Corrupt, CorruptLog, replacements
from dmae_ds.data.decode import decode
from dmae_ds.data.foreign import ForeignShards
from dmae_ds.data.order import batch_positions, block_spans, num_held, sample_ids
from dmae_ds.data.reader import CorruptSample, Sample, SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.transforms import AUGMENT_STREAM, CROP_STREAM, MASK_STREAM, eval_view, sample_rng, train_view
from dmae_ds.data.worker import end_with_parent
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

    @classmethod
    def join(cls, parts: "list[Batch]") -> "Batch":
        """Training batches one behind the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)})

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: None if value is None else function(value) for name, value in fields.items()})


def train_batches(
    shard_set: ShardSet | ForeignShards,
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
    buffer_gib: float = 8.0,
    max_corrupt: int = 0,
    corrupt_log: Path | None = None,
    subset: np.ndarray | None = None,
    crop: str = "torchvision",
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step): `accumulation` a step, `micro_batch` images each.

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
    if subset is not None and block > 1:
        raise UserError(f"data.block {block} reads many consecutive samples for the few that are asked for; set data.block=1")
    if isinstance(shard_set, ForeignShards):
        assert subset is None and augment is None  # those who ask for them open indexed shards
        from dmae_ds.data.stream import StreamedBatches, stream_batches  # webdataset takes a second to import

        streamed = StreamedBatches(
            shard_set, img_size, num_patches, crop_scale, flip, seed=seed, micro_batch=micro_batch, rank=rank, world_size=world_size, start_step=start_step
        )
        num_batches = (stop_step - start_step) * accumulation
        found = stream_batches(streamed, num_batches=num_batches, num_workers=num_workers, pin_memory=pin_memory, max_corrupt=max_corrupt, corrupt_log=corrupt_log)
        return (Batch(**fields) for fields in found)
    if block > 1:
        _check_buffer(shard_set, block=block, world_size=world_size, buffer_gib=buffer_gib)
    # With blocks, every worker loads its own lanes' part of every micro-batch, so that a block is read by one worker.
    parts = max(1, min(num_workers, micro_batch)) if block > 1 else 1
    load = functools.partial(
        _load_train_batch,
        reader=SampleReader(shard_set, block=block, buffer_bytes=int(buffer_gib * 2**30) // max(1, num_workers)),
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
        subset=subset,
        crop=crop,
        augment=augment,
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
    parts: int,
    subset: np.ndarray | None,
    crop: str,
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None,
) -> "Loaded":
    number, part = divmod(number, parts)
    step, accumulation_step = divmod(number, accumulation)
    num_samples = reader.shard_set.num_samples if subset is None else len(subset)
    positions = batch_positions(
        step,
        global_batch=global_batch,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
        accumulation_step=accumulation_step,
        num_samples=num_samples,
        block=reader.block,
    )[part * micro_batch // parts : (part + 1) * micro_batch // parts]
    epochs, ids = sample_ids(positions, num_samples=num_samples, seed=seed, block=reader.block)
    spans = [None] * len(ids)
    if reader.reads_ahead:
        spans = block_spans(epochs, ids, num_samples=num_samples, seed=seed, block=reader.block)
        reader.fetch(spans)
    places, ids = ids, ids if subset is None else subset[ids]
    images = torch.empty((len(ids), 3, img_size, img_size), dtype=torch.uint8)
    noise = np.empty((len(ids), num_patches), np.float32)
    labels, shown, corrupt = np.empty(len(ids), np.int64), ids.copy(), []
    for row, (epoch, sample_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        stand_ins = _stand_ins(int(places[row]), epoch=epoch, num_samples=num_samples, seed=seed, subset=subset)
        sample, image, found = _read_whole(reader, sample_id, span=spans[row], epoch=epoch, stand_ins=stand_ins)
        corrupt += found
        crop_rng = sample_rng(seed, epoch, sample_id, CROP_STREAM)
        view = train_view(image, crop_rng, img_size=img_size, crop_scale=crop_scale, flip=flip, crop=crop)
        if augment is not None:
            view = augment(view, sample_rng(seed, epoch, sample_id, AUGMENT_STREAM))
        images[row] = torch.from_numpy(view)  # faster than numpy at turning [H, W, 3] memory into [3, H, W]
        noise[row] = sample_rng(seed, epoch, sample_id, MASK_STREAM).random(num_patches, dtype=np.float32)
        labels[row], shown[row] = sample.label, sample.sample_id
    return Loaded(Batch(images, *map(torch.from_numpy, (noise, labels, shown, epochs))), corrupt)


def _stand_ins(place: int, *, epoch: int, num_samples: int, seed: int, subset: np.ndarray | None) -> Iterator[int]:
    """The ids that may stand for a sample, of the same subset. Nothing is computed before the first is asked for."""
    for candidate in replacements(place, epoch=epoch, num_samples=num_samples, seed=seed):
        yield candidate if subset is None else int(subset[candidate])


def _read_whole(
    reader: SampleReader, sample_id: int, *, span: tuple[int, int] | None, epoch: int, stand_ins: Iterator[int]
) -> tuple[Sample, np.ndarray, list[Corrupt]]:
    """A sample and its picture, or where it is corrupt those that stand for it (corrupt.py), and what was corrupt."""
    try:
        sample = reader.read(sample_id, span=span)
        return sample, decode(sample), []
    except CorruptSample as error:
        first, found = error, [error]
    for candidate in stand_ins:
        try:
            sample = reader.read(candidate)
            image = decode(sample)
        except CorruptSample as error:
            found.append(error)
            continue
        return sample, image, [Corrupt(e.shard, e.key, e.sample_id, e.reason, epoch, candidate) for e in found]
    raise first


def _load_eval_batch(
    number: int, *, reader: SampleReader, ids: Sequence[int], batch_size: int, img_size: int, crop_pct: float
) -> "Loaded":
    batch_ids = ids[number * batch_size : (number + 1) * batch_size]
    spans = [(sample_id, 1) if reader.reads_ahead else None for sample_id in batch_ids]
    if reader.reads_ahead:
        reader.fetch(spans)
    samples = [reader.read(sample_id, span=span) for sample_id, span in zip(batch_ids, spans, strict=True)]
    images = np.stack([eval_view(decode(sample), img_size=img_size, crop_pct=crop_pct) for sample in samples])
    batch = Batch(
        images=torch.from_numpy(images),
        noise=None,
        labels=torch.tensor([sample.label for sample in samples]),
        sample_ids=torch.tensor(batch_ids),
        epochs=torch.zeros(len(batch_ids), dtype=torch.int64),
    )
    return Loaded(batch, [])


@dataclass(frozen=True)
class Loaded:
    """What a worker hands over."""

    batch: Batch
    corrupt: list[Corrupt]

    def pin_memory(self) -> "Loaded":  # DataLoader calls it
        return Loaded(self.batch.pin_memory(), self.corrupt)


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
