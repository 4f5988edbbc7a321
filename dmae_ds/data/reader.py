"""Read the image bytes and the label of a sample by one positional read, through the index of its shard.

Random access is about seven times as fast as streaming the tar (BENCHMARKS.md, "Reading"), which makes an
exact global shuffle affordable. Blocks of consecutive samples (order.py) are read at once and kept until they
are used up.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from isal import isal_zlib  # a crc32 much faster than zlib's

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import DENSE_MEMBERS, SOURCES, UNPACK_RECORD, ShardError
from dmae_ds.data.storage import NUM_THREADS, LocalFile, RemoteFile

# Two descriptors a local shard (tar and index), and the usual limit of a process is 1,024. A remote index is
# in memory.
MAX_OPEN_SHARDS, MAX_OPEN_REMOTE = 256, 64
MAX_SAMPLE_BYTES = 2**28  # a larger size in an index is an error, or an attempt to exhaust the memory


class OpenShard(NamedTuple):
    """A shard that is open for reading."""

    tar: LocalFile | RemoteFile
    index: np.ndarray
    records: memoryview  # the index again, as bytes


class Sample(NamedTuple):
    """A sample with its image as the original file, not decoded."""

    data: bytes
    label: int
    number: int
    sample_id: int
    shard: str  # the path or URL of its tar

    @property
    def key(self) -> str:
        """Name of the sample in the tar."""
        return f"{self.number:09d}"


class CorruptSample(ShardError):
    """A sample whose bytes are not those that were written, or not an image."""

    def __init__(self, message: str, *, sample_id: int, key: str, shard: str, reason: str):
        super().__init__(message)
        self.sample_id, self.key = sample_id, key
        self.shard, self.reason = shard, reason


class SampleReader:
    """Reader of samples, one by one or from blocks that `fetch` has read ahead; each worker has one."""

    def __init__(self, shard_set: ShardSet, *, block: int = 1, buffer_bytes: int = 2**30):
        self.shard_set, self.block, self.buffer_bytes = shard_set, block, buffer_bytes
        # by shard number; the one that was opened longest ago comes first
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        # by span, then by sample id
        self._blocks: OrderedDict[tuple[int, int], dict[int, bytes | ShardError]] = OrderedDict()
        self._held = 0  # bytes in self._blocks

    def __reduce__(self):  # a spawned worker opens its own files
        return _new_reader, (self.shard_set, self.block, self.buffer_bytes)

    @property
    def reads_ahead(self) -> bool:
        """Whether samples should be fetched before they are read."""
        return self.block > 1 or self.shard_set.tars.is_remote

    def fetch(self, spans: Iterable[tuple[int, int]]) -> None:
        """Read the blocks (first id, number of ids) that are not in memory yet; remote ones in parallel."""
        spans = dict.fromkeys(spans)
        for span in spans:
            if span in self._blocks:
                self._blocks.move_to_end(span)
        pieces = [
            (span, *piece) for span in spans if span not in self._blocks for piece in self._pieces(*span)
        ]
        opened = self._open_shards({shard for _, shard, _, _ in pieces})
        jobs = [(opened[shard], self._first_id(shard) + row, row, end) for _, shard, row, end in pieces]
        read = _map(_read_rows, jobs, in_parallel=self.shard_set.tars.is_remote)
        for (span, *_), samples in zip(pieces, read, strict=True):
            self._blocks.setdefault(span, {}).update(samples)
            self._held += sum(len(data) for data in samples.values() if isinstance(data, bytes))
        while self._held > self.buffer_bytes and next(iter(self._blocks)) not in spans:
            self._drop(next(iter(self._blocks)))

    def read(self, sample_id: int, *, span: tuple[int, int] | None = None) -> Sample:
        """Read one sample, from a block if `span` was fetched.

        Raises CorruptSample if its bytes are not those that were written, ShardError if they cannot be read.
        """
        shard, row = self.shard_set.locate(sample_id)
        file, _, records = self._open.get(shard) or self._open_shard(shard)
        number, offset, size, crc32, _, _, label = UNPACK_RECORD(
            records, row * self.shard_set.record.itemsize
        )
        data = self._take(span, sample_id) if span is not None else None
        if isinstance(data, ShardError):
            raise data
        if data is None:
            data = b"" if size > MAX_SAMPLE_BYTES else file.read(offset, size)
        is_whole = len(data) == size and isal_zlib.crc32(data) == crc32
        if not is_whole and file.forget(offset, size):
            data = file.read(offset, size)
            is_whole = len(data) == size and isal_zlib.crc32(data) == crc32
        sample = Sample(data, label, number, sample_id, file.path)
        if not is_whole:
            raise _corrupt(sample)
        return sample

    def read_members(self, sample_id: int) -> dict[str, bytes]:
        """Read what a sample of a dense set has next to its image: `seg` and `ann`, where it has them.

        Raises CorruptSample and ShardError as `read` does.
        """
        shard, row = self.shard_set.locate(sample_id)
        file, index, _ = self._open.get(shard) or self._open_shard(shard)
        record, members = index[row], {}
        for name in DENSE_MEMBERS:
            offset, size, crc32 = (int(record[f"{name}_{field}"]) for field in ("offset", "size", "crc32"))
            if not size:
                continue
            data = b"" if size > MAX_SAMPLE_BYTES else file.read(offset, size)
            if isal_zlib.crc32(data) != crc32 and file.forget(offset, size):
                data = file.read(offset, size)
            if len(data) != size or isal_zlib.crc32(data) != crc32:
                number, label = int(record["number"]), int(record["label"])
                raise _corrupt(Sample(data, label, number, sample_id, file.path))
            members[name] = data
        return members

    def _take(self, span: tuple[int, int] | None, sample_id: int) -> bytes | ShardError | None:
        """Remove the bytes of a sample from a fetched block and return them; a sample comes once an epoch."""
        if span not in self._blocks:
            return None
        data = self._blocks[span].pop(sample_id, None)
        self._held -= len(data) if isinstance(data, bytes) else 0
        if not self._blocks[span]:
            del self._blocks[span]
        return data

    def _drop(self, span: tuple[int, int]) -> None:
        self._held -= sum(len(data) for data in self._blocks.pop(span).values() if isinstance(data, bytes))

    def _pieces(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Cut a block that crosses the end of a shard or of the set into (shard, first row, end row)."""
        pieces = []
        while count:
            shard, row = self.shard_set.locate(first)
            end = min(row + count, self.shard_set.shards[shard].num_samples)
            pieces.append((shard, row, end))
            count -= end - row
            first = (first + end - row) % self.shard_set.num_samples
        return pieces

    def _first_id(self, shard: int) -> int:
        return self.shard_set.ends[shard] - self.shard_set.shards[shard].num_samples

    def _open_shard(self, shard: int) -> OpenShard:
        if shard not in self._open:
            self._open_shards({shard})
        return self._open[shard]

    def _open_shards(self, shards: set[int]) -> dict[int, OpenShard]:
        """Open the tar and the index of each shard; remote indexes are read in parallel."""
        missing = sorted(shards - self._open.keys())
        is_remote = self.shard_set.indexes.is_remote
        indexes = _map(self.shard_set.open_index, missing, in_parallel=is_remote)
        for shard, index in zip(missing, indexes, strict=True):
            entry = self.shard_set.shards[shard]
            tar = self.shard_set.tars.open(entry.name, size=entry.bytes)
            self._open[shard] = OpenShard(tar, index, memoryview(index.view(np.uint8)))
        opened = {shard: self._open[shard] for shard in shards}
        while len(self._open) > (MAX_OPEN_REMOTE if is_remote else MAX_OPEN_SHARDS):
            self._open.popitem(last=False)
        return opened


def _corrupt(sample: Sample) -> CorruptSample:
    return CorruptSample(
        f"{sample.shard}: sample {sample.key} is corrupt (its bytes do not have the crc32 of the "
        f"index); copy the shard, or make it again (its source is line {sample.number + 1} of {SOURCES})",
        sample_id=sample.sample_id,
        key=sample.key,
        shard=sample.shard,
        reason="crc32",
    )


def _map(function: Callable, items: Sequence, *, in_parallel: bool) -> list:
    if not in_parallel or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(NUM_THREADS, len(items))) as pool:
        return list(pool.map(function, items))


def _read_rows(job: tuple[OpenShard, int, int, int]) -> dict[int, bytes | ShardError]:
    """Read consecutive rows at once; returns the bytes by sample id, or the error of the read.

    job: (shard, first id, first row, end row)
    """
    (file, index, _), first_id, row, end = job
    offsets, sizes = (index[field][row:end].astype(np.int64) for field in ("offset", "size"))
    low, high = int(offsets.min()), int((offsets + sizes).max())
    if high - low > MAX_SAMPLE_BYTES:  # the index has another order than its tar, or images are huge
        return {}
    try:
        data = memoryview(file.read(low, high - low))
    except ShardError as error:
        return {first_id + number: error for number in range(end - row)}
    offsets = (offsets - low).tolist()
    return {
        first_id + number: bytes(data[offset : offset + size])
        for number, (offset, size) in enumerate(zip(offsets, sizes.tolist(), strict=True))
    }


def _new_reader(shard_set: ShardSet, block: int, buffer_bytes: int) -> SampleReader:
    return SampleReader(shard_set, block=block, buffer_bytes=buffer_bytes)
