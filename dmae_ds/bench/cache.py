"""Training from stored features next to a live teacher, and reading them next to plain reads of the bytes.

    dmae-ds bench cache RECIPE [key=value] [--dtype fp32 bf16 int8] [--folder FOLDER]

The recipe gives networks, taps and the micro-batch; weights, pixels and so the features are random. Steps
take turns, round after round, and so do readings; a row has medians. Files are read from the page cache,
where crc32 and copies weigh most; a cache has more bytes than the processor's own caches hold, so neither
way of reading finds them there. `restored too` is the share of plain reads where the run's dtype is made of
what was read: arithmetic on as many numbers, however few bytes they were. Seconds belong to one machine;
the ratios are what to look at.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from isal import isal_zlib
from torch import Tensor

from dmae_ds.bench.random_batch import random_batch
from dmae_ds.bench.training_step import TrainingStep
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.storage import Access
from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.output.table import text_table
from dmae_ds.teacher.cache_codec import Codec, FitSums, build_codecs, fit, needs_fit, write_codec
from dmae_ds.teacher.cache_file import FileWriter
from dmae_ds.teacher.cache_layout import CODEC, STORED, SUMS, Layout, StoredTap
from dmae_ds.teacher.cache_manifest import Manifest
from dmae_ds.teacher.stored import AHEAD, StoredTeacher
from dmae_ds.train.speed import wait_for

MIN_BYTES = 2**28  # that a cache has, at least; a run reads them again and again
READINGS = 5  # of all its bytes a round


def bench_cache(config: RunConfig, *, dtypes: list[str], folder: Path | None, rounds: int) -> str:
    """Measure a recipe and return the table. Makes a process group of one rank.

    dtypes: to store, keys of STORED; folder: where the caches are written; None: a temporary folder
    Raises UserError for a recipe without a teacher.
    """
    if config.teacher is None:
        raise UserError("bench cache needs a recipe with a teacher, such as dmae_vit_large_to_base")
    world = World()
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        step = TrainingStep(config, world=world, device=device, data=False)
        generator = torch.Generator().manual_seed(0)
        batch = random_batch(step.objective, step.micro_batch, generator).to(device)
        features = step.teacher.features(step.objective.prepare(batch, step.normalize))
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            caches = {dtype: _Cache(Path(temporary) / dtype, features, dtype, step) for dtype in dtypes}
            return _table(step, caches, rounds=rounds, device=device)


class _Cache:
    """A cache of one micro-batch's features in every step, its reader, and a teacher that reads it."""

    def __init__(self, folder: Path, features: dict[str, Tensor], dtype: str, step: TrainingStep):
        folder.mkdir()
        self.folder, self.num_rows, self.device = folder, step.micro_batch, step.device
        taps = tuple(_stored_tap(name, tensor, dtype, self.num_rows) for name, tensor in features.items())
        num_steps = -(-MIN_BYTES // (self.num_rows * sum(tap.num_bytes for tap in taps)))
        self.layout = Layout.of(
            taps, global_batch=self.num_rows, lane_rows=self.num_rows, num_steps=num_steps
        )
        codecs, crc32 = _codecs(folder, taps, features, step.device)
        self._write(codecs, features)
        errors = {tap.name: {"relative": 0.0, "cosine": 1.0} for tap in taps}
        Manifest({}, {}, {}, {}, self.layout, crc32, True, errors).write(folder)
        self.stored = StoredTeacher(str(folder), tuple(features), access=Access(), device=step.device)
        self._stream = self.stored.stream(self._rows())

    def features(self, masked: PatchBatch) -> dict[str, Tensor]:
        """The next micro-batch's features, in place of a live teacher's."""
        return next(self._stream)[2]

    def read(self, *, restore: bool = False) -> None:
        """Read all steps once, without the threads that do it ahead of a run."""
        for batch, _ in itertools.islice(self._rows(), self.layout.num_steps):
            raw = self.stored.read(batch)
            if restore:
                self.stored.restore(raw)

    def read_plainly(self) -> None:
        """Read the same bytes into memory, from the beginning of each file to its end.

        A micro-batch at once, of which as many stay as wait for the student in a run.
        """
        size, waiting = self.num_rows * self.layout.row_bytes, deque(maxlen=AHEAD + 1)
        for name in self.layout.sizes(self.layout.first_steps()):
            with open(self.folder / name, "rb", buffering=0) as file:
                while len(data := np.fromfile(file, np.uint8, size)):
                    waiting.append(data)

    def _rows(self) -> Iterator[tuple[Batch, None]]:
        numbers = torch.arange(self.num_rows)
        for step in itertools.cycle(range(self.layout.num_steps)):
            rows = step * self.num_rows + numbers
            yield Batch(None, None, sample_ids=rows, epochs=numbers * 0, rows=rows), None

    def _write(self, codecs: list[Codec], features: dict[str, Tensor]) -> None:
        encoded = torch.cat([codec.encode(features[codec.tap.name]) for codec in codecs], dim=1)
        content, sums = encoded.cpu().numpy(), np.zeros((len(codecs), SUMS))
        for first in self.layout.first_steps():
            with open(self.folder / self.layout.file_name(first, 0), "wb") as file:
                writer = FileWriter(file, self.layout)
                for start in range(0, self.layout.num_rows(first), self.num_rows):
                    rows = first * self.num_rows + start + np.arange(self.num_rows)
                    writer.add(content, epochs=rows * 0, sample_ids=rows, sums=sums)
                writer.finish()


def _stored_tap(name: str, tensor: Tensor, dtype: str, num_rows: int) -> StoredTap:
    shape = (len(tensor) // num_rows, *tensor.shape[1:])
    return StoredTap(name, shape, str(tensor.dtype).removeprefix("torch."), STORED[dtype], shape[-1])


def _codecs(
    folder: Path, taps: tuple[StoredTap, ...], features: dict[str, Tensor], device: torch.device
) -> tuple[list[Codec], int | None]:
    """The codecs of all taps, with statistics of these features, and the crc32 of their file."""
    fitted = {}
    for tap in filter(needs_fit, taps):
        sums = FitSums(tap.shape[-1], features[tap.name].abs().max().item(), device)
        sums.add(features[tap.name])
        fitted[tap.name] = fit(tap, *sums.moments())
    if not fitted:
        return build_codecs(taps, None, device), None
    write_codec(folder, fitted)
    content = (folder / CODEC).read_bytes()
    return build_codecs(taps, content, device), isal_zlib.crc32(content)


def _table(step: TrainingStep, caches: dict[str, _Cache], *, rounds: int, device: torch.device) -> str:
    """Measure everything in turns; a row is the live teacher or a cache."""
    live = step.teacher

    def take(teacher: object) -> Callable[[], None]:
        def taken() -> None:
            step.teacher = teacher
            step.take()

        return taken

    steps = {"live": take(live), **{dtype: take(cache) for dtype, cache in caches.items()}}
    readings: dict[str, Callable[[], None]] = {}
    for dtype, cache in caches.items():
        readings |= {f"{dtype} read": cache.read, f"{dtype} plain": cache.read_plainly}
        readings[f"{dtype} restored"] = functools.partial(cache.read, restore=True)
    medians = _medians(steps, rounds, device) | _medians(readings, READINGS * rounds, device)
    images = step.micro_batch * step.accumulation
    heads = ("features", "bytes an image", "images/s of a step", "of live", "MB/s read", "of plain reads")
    cells = [(*heads, "restored too"), ("live", "", f"{images / medians['live']:.2f}", "1.00", "", "", "")]
    for dtype, cache in caches.items():
        megabytes, plain = cache.layout.total_bytes() / 1e6, medians[f"{dtype} plain"]
        cells.append(
            (
                f"stored, {dtype}",
                f"{cache.layout.row_bytes:,}",
                f"{images / medians[dtype]:.2f}",
                f"{medians['live'] / medians[dtype]:.2f}",
                f"{megabytes / medians[f'{dtype} read']:,.0f}",
                f"{plain / medians[f'{dtype} read']:.2f}",
                f"{plain / medians[f'{dtype} restored']:.2f}",
            )
        )
    taps = ", ".join(f"{tap.name} {list(tap.shape)}" for tap in next(iter(caches.values())).layout.taps)
    title = f"{taps} an image; {step.accumulation} x {step.micro_batch} images a step; {device.type}; "
    title += f"medians of {rounds} steps and {READINGS * rounds} readings"
    return f"{title}\n\n" + "\n".join(text_table(cells))


def _medians(tasks: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of tasks by name, which take turns; a round before the others warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            since = time.perf_counter()
            task()
            wait_for(device)
            if number:
                seconds[name].append(time.perf_counter() - since)
    return {name: statistics.median(times) for name, times in seconds.items()}
