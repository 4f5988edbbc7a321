"""One batch, as a worker makes it from its number: which samples, their bytes, pictures, crops and mask noise.

A corrupt sample is replaced by one that the order names (corrupt.py), so that ranks stay in step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmae_ds.data.corrupt import Corrupt, replacements
from dmae_ds.data.decode import decode
from dmae_ds.data.order import batch_positions, block_spans, sample_ids
from dmae_ds.data.reader import CorruptSample, Sample, SampleReader
from dmae_ds.data.transforms import AUGMENT_STREAM, MASK_STREAM, draw_views, eval_view, sample_rng
from dmae_ds.data.views import View


@dataclass(frozen=True)
class Batch:
    images: torch.Tensor  # [N, 3, H, W] uint8
    noise: torch.Tensor | None  # [N, L] float32 in [0, 1), one draw a patch for the mask; None in evaluation
    labels: torch.Tensor | None = None  # [N] int64
    sample_ids: torch.Tensor | None = None  # [N] int64
    epochs: torch.Tensor | None = None  # [N] int64
    more_views: tuple[torch.Tensor, ...] = ()  # other crops of the same pictures, each [N, 3, S, S] uint8

    @property
    def views(self) -> tuple[torch.Tensor, ...]:
        """All crops of the pictures, in the order in which they were asked for; the first is `images`."""
        return (self.images, *self.more_views)

    def to(self, device: torch.device | str) -> "Batch":
        """Everything that is computed with. Ids and epochs stay on the host, whose draws they key: to read them back would wait for the device."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return dataclasses.replace(moved, sample_ids=self.sample_ids, epochs=self.epochs)

    def first(self, num: int) -> "Batch":
        """Its first `num` samples."""
        return self._map(lambda tensor: tensor[:num])

    def used_on(self, stream: "torch.cuda.Stream") -> None:
        """Its memory came from another stream: it is not to be given away before this one has done with it."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":  # DataLoader calls it
        return self._map(torch.Tensor.pin_memory)

    @classmethod
    def join(cls, parts: "list[Batch]") -> "Batch":
        """Training batches one behind the other."""
        if len(parts) == 1:
            return parts[0]
        columns = {
            field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(cls)
        }
        return cls(
            **{
                name: tuple(map(torch.cat, zip(*values))) if name == "more_views" else torch.cat(values)
                for name, values in columns.items()
            }
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(
            **{
                name: tuple(map(function, value))
                if isinstance(value, tuple)
                else None
                if value is None
                else function(value)
                for name, value in fields.items()
            }
        )


@dataclass(frozen=True)
class Loaded:
    """What a worker hands over."""

    batch: Batch
    corrupt: list[Corrupt]

    def pin_memory(self) -> "Loaded":  # DataLoader calls it
        return Loaded(self.batch.pin_memory(), self.corrupt)


def load_train_batch(
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
    repeat: int,
    subset: np.ndarray | None,
    crop: str,
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None,
    views: tuple[View, ...],
) -> Loaded:
    """One part of one micro-batch of one rank, by its number alone; arguments as `train_batches` has them. Raises ShardError."""
    number, part = divmod(number, parts)
    step, accumulation_step = divmod(number, accumulation)
    num_samples = reader.shard_set.num_samples if subset is None else len(subset)
    # Of a sample's `repeat` views all stand in one micro-batch, one behind the other: the order is one of samples.
    positions = batch_positions(
        step,
        global_batch=global_batch // repeat,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch // repeat,
        accumulation_step=accumulation_step,
        num_samples=num_samples,
        block=reader.block,
    )[part * (micro_batch // repeat) // parts : (part + 1) * (micro_batch // repeat) // parts]
    epochs, ids = sample_ids(positions, num_samples=num_samples, seed=seed, block=reader.block)
    spans = [None] * len(ids)
    if reader.reads_ahead:
        spans = block_spans(epochs, ids, num_samples=num_samples, seed=seed, block=reader.block)
        reader.fetch(spans)
    places, ids = ids, ids if subset is None else subset[ids]
    pixels = empty_views(views, len(ids) * repeat, img_size=img_size)
    noise = np.empty((len(ids) * repeat, num_patches), np.float32)
    labels, shown, corrupt = np.empty(len(ids), np.int64), ids.copy(), []
    for row, (epoch, sample_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        stand_ins = _stand_ins(
            int(places[row]), epoch=epoch, num_samples=num_samples, seed=seed, subset=subset
        )
        sample, image, found = _read_whole(
            reader, sample_id, span=spans[row], epoch=epoch, stand_ins=stand_ins
        )
        corrupt += found
        for number in range(repeat):
            key = {"seed": seed, "epoch": epoch, "sample_id": sample_id}
            drawn = draw_views(
                image,
                views,
                **key,
                number=number,
                img_size=img_size,
                crop_scale=crop_scale,
                flip=flip,
                crop=crop,
            )
            for place, view in enumerate(drawn):
                view_key = number * len(views) + place
                if augment is not None:
                    view = augment(view, sample_rng(**key, stream=AUGMENT_STREAM, view=view_key))
                pixels[place][row * repeat + number] = torch.from_numpy(
                    view
                )  # faster than numpy at turning [H, W, 3] memory into [3, H, W]
            mask_rng = sample_rng(**key, stream=MASK_STREAM, view=number * len(views))
            noise[row * repeat + number] = mask_rng.random(num_patches, dtype=np.float32)
        labels[row], shown[row] = sample.label, sample.sample_id
    per_view = (np.repeat(found, repeat) for found in (labels, shown, epochs))
    return Loaded(
        Batch(
            pixels[0], torch.from_numpy(noise), *map(torch.from_numpy, per_view), more_views=tuple(pixels[1:])
        ),
        corrupt,
    )


def empty_views(views: tuple[View, ...], num: int, *, img_size: int) -> list[torch.Tensor]:
    """Room for each view of `num` pictures: [num, 3, S, S] uint8."""
    return [
        torch.empty((num, 3, view.size or img_size, view.size or img_size), dtype=torch.uint8)
        for view in views
    ]


def _stand_ins(
    place: int, *, epoch: int, num_samples: int, seed: int, subset: np.ndarray | None
) -> Iterator[int]:
    """The ids that may stand for a sample, of the same subset. Nothing is computed before the first is asked for."""
    for candidate in replacements(place, epoch=epoch, num_samples=num_samples, seed=seed):
        yield candidate if subset is None else int(subset[candidate])


def _read_whole(
    reader: SampleReader,
    sample_id: int,
    *,
    span: tuple[int, int] | None,
    epoch: int,
    stand_ins: Iterator[int],
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
        return (
            sample,
            image,
            [Corrupt(e.shard, e.key, e.sample_id, e.reason, epoch, candidate) for e in found],
        )
    raise first


def load_eval_batch(
    number: int, *, reader: SampleReader, ids: Sequence[int], batch_size: int, img_size: int, crop_pct: float
) -> Loaded:
    """The central crops of ids [number * batch_size, (number + 1) * batch_size). Raises ShardError."""
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
