"""One batch, made by a worker from its number alone: its samples, their bytes, images, crops and mask noise.

A corrupt sample is replaced by one that the order determines (corrupt.py), so ranks stay in step.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.corrupt import Corrupt, replacements
from dmae_ds.data.decode import decode
from dmae_ds.data.order import batch_positions, block_spans, sample_ids
from dmae_ds.data.pixels import RGB, PixelFormat
from dmae_ds.data.reader import CorruptSample, Sample, SampleReader
from dmae_ds.data.transforms import AUGMENT_STREAM, MASK_STREAM, draw_views, eval_view, sample_rng

DTYPES = {8: torch.uint8, 16: torch.float32}  # of pixels by their bits


@dataclass(frozen=True)
class Batch:
    """Images with what is needed to mask and to score them."""

    images: torch.Tensor  # [N, C, H, W] uint8, or float32 from 0 to 255 (data.bits=16)
    noise: torch.Tensor | None  # [N, L] float32 in [0, 1), one draw a patch for the mask; None in evaluation
    labels: torch.Tensor | None = None  # [N] int64
    sample_ids: torch.Tensor | None = None  # [N] int64
    epochs: torch.Tensor | None = None  # [N] int64
    more_views: tuple[torch.Tensor, ...] = ()  # further crops of the same images, each [N, C, S, S]
    # [N] int64, numbers of the rows in the run: step * global_batch + row of the global batch. With
    # `BatchSpec.replay` those of the step that is shown again; None in evaluation and without an index.
    rows: torch.Tensor | None = None

    @property
    def views(self) -> tuple[torch.Tensor, ...]:
        """All crops of the images, in the order of `BatchSpec.views`; the first is `images`."""
        return (self.images, *self.more_views)

    def to(self, device: torch.device | str) -> "Batch":
        """Move the tensors that are computed with to a device.

        Ids, epochs and rows stay on the host, where they key random draws and name stored features: reading
        them back would wait for the device.
        """
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        return dataclasses.replace(moved, sample_ids=self.sample_ids, epochs=self.epochs, rows=self.rows)

    def first(self, num: int) -> "Batch":
        """The first `num` samples of the batch."""
        return self._map(lambda tensor: tensor[:num])

    def used_on(self, stream: "torch.cuda.Stream") -> None:
        """Keep the memory, which another stream allocated, until the work queued on `stream` has used it."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """Copy the batch to pinned memory; DataLoader calls this."""
        return self._map(torch.Tensor.pin_memory)

    @classmethod
    def join(cls, batches: "list[Batch]") -> "Batch":
        """Concatenate training batches."""
        if len(batches) == 1:
            return batches[0]
        joined = {}
        for field in dataclasses.fields(cls):
            values = [getattr(batch, field.name) for batch in batches]
            is_tuple = field.name == "more_views"
            joined[field.name] = (
                tuple(map(torch.cat, zip(*values, strict=True))) if is_tuple else torch.cat(values)
            )
        return cls(**joined)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Apply a function to every tensor."""
        mapped = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                mapped[field.name] = tuple(map(function, value))
            elif value is not None:
                mapped[field.name] = function(value)
            else:
                mapped[field.name] = None
        return Batch(**mapped)


@dataclass(frozen=True)
class Loaded:
    """A batch as a worker returns it, with the corrupt samples it met."""

    batch: Batch
    corrupt: list[Corrupt]

    def pin_memory(self) -> "Loaded":
        """Copy the batch to pinned memory; DataLoader calls this."""
        return Loaded(self.batch.pin_memory(), self.corrupt)


class BatchRows:
    """Pixels and mask noise of a training batch, filled row by row."""

    def __init__(self, num_rows: int, spec: BatchSpec):
        self.spec = spec
        sides = [view.size or spec.img_size for view in spec.views]
        channels, dtype = spec.pixels.channels, DTYPES[spec.pixels.bits]
        self.pixels = [torch.empty((num_rows, channels, side, side), dtype=dtype) for side in sides]
        self.noise = torch.empty((num_rows, spec.num_patches))

    def fill(self, row: int, image: np.ndarray, *, epoch: int, sample_id: int, number: int = 0) -> None:
        """Draw the views and the mask noise of one row.

        image: [H, W, C], as `spec.pixels` says
        sample_id: keys the draws; of the planned sample where `image` replaces a corrupt one
        number: how often the image was used before in this epoch (data.repeat)
        """
        spec, first_view = self.spec, number * len(self.spec.views)
        views = draw_views(image, spec, epoch=epoch, sample_id=sample_id, first_view=first_view)
        for place, view in enumerate(views):
            if spec.augment is not None:
                key = first_view + place
                view = spec.augment(view, sample_rng(spec.seed, epoch, sample_id, AUGMENT_STREAM, view=key))
            # torch is faster than numpy at copying [H, W, 3] memory into [3, H, W]
            self.pixels[place][row] = torch.from_numpy(view)
        mask_rng = sample_rng(spec.seed, epoch, sample_id, MASK_STREAM, view=first_view)
        self.noise[row] = torch.from_numpy(mask_rng.random(spec.num_patches, dtype=np.float32))

    def batch(
        self,
        *,
        labels: torch.Tensor,
        sample_ids: torch.Tensor,
        epochs: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> Batch:
        """Make a batch of the filled rows; the arguments are [num_rows] int64."""
        return Batch(self.pixels[0], self.noise, labels, sample_ids, epochs, tuple(self.pixels[1:]), rows)


def load_train_batch(number: int, *, reader: SampleReader, spec: BatchSpec, num_pieces: int) -> Loaded:
    """Load one of the `num_pieces` pieces of a micro-batch of this rank. Raises ShardError.

    number: counts the pieces of all micro-batches from the start of the run
    """
    num_samples = reader.shard_set.num_samples if spec.subset is None else len(spec.subset)
    positions = _piece_positions(number, spec, num_samples=num_samples, num_pieces=num_pieces)
    epochs, places = sample_ids(positions, num_samples=num_samples, seed=spec.seed, block=spec.block)
    ids = places if spec.subset is None else spec.subset[places]
    spans = [None] * len(ids)
    if reader.reads_ahead:
        spans = block_spans(epochs, places, num_samples=num_samples, seed=spec.seed, block=spec.block)
        reader.fetch(spans)
    rows = BatchRows(len(ids) * spec.repeat, spec)
    labels, shown_ids, corrupt = np.empty(len(ids), np.int64), ids.copy(), []
    for row, (epoch, sample_id) in enumerate(zip(epochs.tolist(), ids.tolist(), strict=True)):
        stand_ins = _stand_ins(int(places[row]), epoch=epoch, num_samples=num_samples, spec=spec)
        sample, image, newly_corrupt = _read_whole(
            reader, sample_id, span=spans[row], epoch=epoch, stand_ins=stand_ins, pixels=spec.pixels
        )
        corrupt += newly_corrupt
        for repetition in range(spec.repeat):
            place = row * spec.repeat + repetition
            rows.fill(place, image, epoch=epoch, sample_id=sample_id, number=repetition)
        labels[row], shown_ids[row] = sample.label, sample.sample_id
    labels, shown_ids, epochs = (
        torch.from_numpy(np.repeat(values, spec.repeat)) for values in (labels, shown_ids, epochs)
    )
    numbers = _piece_rows(number, spec, num_pieces=num_pieces)
    batch = rows.batch(labels=labels, sample_ids=shown_ids, epochs=epochs, rows=numbers)
    return Loaded(batch, corrupt)


def _piece_step(number: int, spec: BatchSpec, *, num_pieces: int) -> tuple[int, int, int]:
    """The step whose samples a piece of a micro-batch shows, its accumulation step, and its place in that."""
    micro_number, piece = divmod(number, num_pieces)
    step, accumulation_step = divmod(micro_number, spec.accumulation)
    return step if spec.replay is None else step % spec.replay, accumulation_step, piece


def _piece_rows(number: int, spec: BatchSpec, *, num_pieces: int) -> torch.Tensor:
    """Numbers in the run of the rows of one piece of a micro-batch, int64 (`Batch.rows`)."""
    step, accumulation_step, piece = _piece_step(number, spec, num_pieces=num_pieces)
    first = step * spec.global_batch + spec.rank * (spec.global_batch // spec.world_size)
    first += accumulation_step * spec.micro_batch
    num_in_micro = spec.micro_batch // spec.repeat
    start, stop = (place * num_in_micro // num_pieces * spec.repeat for place in (piece, piece + 1))
    return torch.arange(first + start, first + stop)


def _piece_positions(number: int, spec: BatchSpec, *, num_samples: int, num_pieces: int) -> np.ndarray:
    """Positions in the run of the samples of one piece of a micro-batch, int64."""
    step, accumulation_step, piece = _piece_step(number, spec, num_pieces=num_pieces)
    # All `repeat` rows of a sample are in one micro-batch, next to each other: the order is one of samples.
    num_in_micro = spec.micro_batch // spec.repeat
    positions = batch_positions(
        step,
        global_batch=spec.global_batch // spec.repeat,
        rank=spec.rank,
        world_size=spec.world_size,
        micro_batch=num_in_micro,
        accumulation_step=accumulation_step,
        num_samples=num_samples,
        block=spec.block,
    )
    return positions[piece * num_in_micro // num_pieces : (piece + 1) * num_in_micro // num_pieces]


def _stand_ins(place: int, *, epoch: int, num_samples: int, spec: BatchSpec) -> Iterator[int]:
    """Ids that may replace a sample, of the same subset; nothing is computed before the first is needed."""
    for candidate in replacements(place, epoch=epoch, num_samples=num_samples, seed=spec.seed):
        yield candidate if spec.subset is None else int(spec.subset[candidate])


def _read_whole(
    reader: SampleReader,
    sample_id: int,
    *,
    span: tuple[int, int] | None,
    epoch: int,
    stand_ins: Iterator[int],
    pixels: PixelFormat,
) -> tuple[Sample, np.ndarray, list[Corrupt]]:
    """Read a sample and its image, or the first readable stand-in, and list what was corrupt (corrupt.py)."""
    try:
        sample = reader.read(sample_id, span=span)
        return sample, decode(sample, pixels), []
    except CorruptSample as error:
        errors = [error]
    for candidate in stand_ins:
        try:
            sample = reader.read(candidate)
            image = decode(sample, pixels)
        except CorruptSample as error:
            errors.append(error)
            continue
        corrupt = [Corrupt(e.shard, e.key, e.sample_id, e.reason, epoch, candidate) for e in errors]
        return sample, image, corrupt
    raise errors[0]


def load_eval_batch(
    number: int,
    *,
    reader: SampleReader,
    ids: Sequence[int],
    batch_size: int,
    img_size: int,
    crop_pct: float,
    pixels: PixelFormat = RGB,
) -> Loaded:
    """Load the central crops of ids [number * batch_size, (number + 1) * batch_size). Raises ShardError."""
    batch_ids = ids[number * batch_size : (number + 1) * batch_size]
    spans = [(sample_id, 1) if reader.reads_ahead else None for sample_id in batch_ids]
    if reader.reads_ahead:
        reader.fetch(spans)
    samples = [reader.read(sample_id, span=span) for sample_id, span in zip(batch_ids, spans, strict=True)]
    decoded = (decode(sample, pixels) for sample in samples)
    images = np.stack([eval_view(image, img_size=img_size, crop_pct=crop_pct) for image in decoded])
    batch = Batch(
        images=torch.from_numpy(images),
        noise=None,
        labels=torch.tensor([sample.label for sample in samples]),
        sample_ids=torch.tensor(batch_ids),
        epochs=torch.zeros(len(batch_ids), dtype=torch.int64),
    )
    return Loaded(batch, [])
