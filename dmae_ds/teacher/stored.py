"""The teacher of a run that reads features which `dmae-ds teacher cache` stored: no network, the same stream.

Two micro-batches ahead of the student, threads read the rows of a batch, and compare their crc32 and the
epochs and sample ids next to them with the batch's own.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Iterable, Iterator

import torch
from isal import isal_zlib
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.data.storage import Access
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.teacher.cache_codec import build_codecs, empty_on
from dmae_ds.teacher.cache_file import LABEL, RowReader, damaged, open_cache
from dmae_ds.teacher.cache_layout import CODEC
from dmae_ds.teacher.cache_manifest import Manifest
from dmae_ds.teacher.early import open_manifest

AHEAD = 2  # micro-batches that are read before the student needs them
THREADS = 2
MOST_CODEC_BYTES = 2**32


class StoredTeacher:
    """Features of a cache, with the interface of the replicated teacher.

    location: the cache's folder or URL; taps: those that the objective reads
    Raises UserError where the cache lacks one of them.
    """

    def __init__(self, location: str, taps: tuple[str, ...], *, access: Access, device: torch.device):
        self.location, self.taps, self.device = location, taps, device
        self.manifest = open_manifest(location, access=access)
        layout = self.manifest.layout
        known = [tap.name for tap in layout.taps]
        missing = [tap for tap in taps if tap not in known]
        if missing:
            raise UserError(
                f"{LABEL} '{location}' has features of {', '.join(known)}, and the objective taps "
                f"{', '.join(missing)}; make a cache of this recipe with dmae-ds teacher cache"
            )
        self.reader = RowReader(location, layout, access=access)
        content = read_codec(self.manifest, location, access=access)
        self.codecs = build_codecs(layout.taps, content, device)

    def __str__(self) -> str:
        layout = self.manifest.layout
        stored = ", ".join(describe_stored(self.manifest, tap) for tap in self.taps)
        return (
            f"no network: features stored in {self.location}, {layout.num_steps:,} steps, "
            f"{layout.row_bytes:,} bytes an image: {stored}"
        )

    def networks(self) -> list[nn.Module]:
        """The networks whose blocks kernels may be chosen for: none."""
        return []

    def where(self) -> str:
        """The teacher's place in a run, for messages about a failure: none."""
        return ""

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """Take (micro-batch, masked batch) and yield both with features, in order.

        Raises UserError for damaged files, and RunFailed for rows of other images than the batch's.
        """
        waiting: deque[tuple[object, object, Future]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for source, masked in batches:
                    # next to other teachers, and of a family, it comes with their features
                    batch = source
                    while isinstance(batch, tuple):
                        batch = batch[0]
                    waiting.append((source, masked, pool.submit(self.read, batch)))
                    if len(waiting) > AHEAD:
                        yield self._finished(*waiting.popleft())
                while waiting:
                    yield self._finished(*waiting.popleft())
            finally:
                for _, _, reading in waiting:
                    reading.cancel()

    def read(self, batch: Batch) -> Tensor:
        """Read the rows of a batch, [n, row_bytes] uint8 on the host; raises as `stream` does."""
        first, shape = int(batch.rows[0]), (len(batch.rows), self.manifest.layout.row_bytes)
        if self.device.type == "cuda":  # torch uses pinned memory again once its copy to the device has ended
            raw = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            raw = empty_on(self.device, shape, torch.uint8)
        entries = self.reader.read(first, raw.numpy())
        same = (entries["sample_id"] == batch.sample_ids.numpy()) & (entries["epoch"] == batch.epochs.numpy())
        if not same.all():
            row = int(first + (~same).argmax())
            raise RunFailed(
                f"{LABEL} '{self.location}' has features of another image at row {row:,} of the run than the "
                "loader gives; were images replaced (data.max_corrupt) on one side alone? Make it again"
            )
        return raw

    def _finished(self, source: object, masked: object, reading: Future) -> tuple:
        return source, masked, self.restore(reading.result())

    def restore(self, raw: Tensor) -> dict[str, Tensor]:
        """Features by tap on the device, as the teacher gave them, from rows [n, row_bytes] uint8."""
        raw = raw.to(self.device, non_blocking=True)
        features, start = {}, 0
        for codec in self.codecs:
            tap = codec.tap
            if tap.name in self.taps:
                features[tap.name] = codec.decode(raw[:, start : start + tap.num_bytes])
            start += tap.num_bytes
        return features


def read_codec(manifest: Manifest, location: str, *, access: Access) -> bytes | None:
    """Read the file with means and directions; None where the cache has none. Raises UserError."""
    if manifest.codec_crc32 is None:
        return None
    folder = open_cache(location, access=access)
    try:
        content = folder.read_all(CODEC, limit=MOST_CODEC_BYTES)
    except FileNotFoundError:
        raise UserError(f"{LABEL} '{location}' lacks {CODEC}; copy it again") from None
    if isal_zlib.crc32(content) != manifest.codec_crc32:
        raise damaged(folder.path(CODEC), "it")
    return content


def describe_stored(manifest: Manifest, name: str) -> str:
    """How a tap is stored, and what was lost: "block/18 int8, error .012, cosine .9999"."""
    tap = next(tap for tap in manifest.layout.taps if tap.name == name)
    text = f"{name} {tap.stored}"
    if tap.width < tap.shape[-1]:
        text += f", {tap.width} of {tap.shape[-1]} dimensions"
    if tap.is_exact:
        return f"{text}, exact"
    error = manifest.errors.get(name)
    return text if error is None else f"{text}, error {error['relative']:.3g}, cosine {error['cosine']:.6g}"
