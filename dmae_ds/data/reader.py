"""Sample id -> bytes of the image and its label, by one `pread` through the index of its shard.

Random access at 10 times the speed of streaming the tar (measured, one core), which is what makes an exact global
shuffle affordable. `pread` moves no file position, so descriptors inherited by a forked worker need no care.
"""

import os
import weakref
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import SOURCES, ShardError

# Two descriptors a shard (tar and index), and the usual limit of a process is 1,024.
MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class Sample:
    """The original file, undecoded."""

    data: bytes
    label: int
    key: str  # its name in the tar: 9 digits
    sample_id: int
    shard: Path


class SampleReader:
    def __init__(self, shard_set: ShardSet):
        self.shard_set = shard_set
        # shard -> (descriptor of the tar, index), the one that was used longest ago first
        self._open: OrderedDict[int, tuple[int, np.memmap]] = OrderedDict()
        weakref.finalize(self, _close, self._open)

    def __reduce__(self):
        return SampleReader, (self.shard_set,)  # a spawned worker opens its own files

    def read(self, sample_id: int) -> Sample:
        """One sample. Raises ShardError if its bytes are not those that were written."""
        shard, row = self.shard_set.locate(sample_id)
        path = self.shard_set.folder / self.shard_set.shards[shard].name
        descriptor, index = self._open_shard(shard, path)
        record = index[row]
        key = f"{record['number']:09d}"
        try:
            data = os.pread(descriptor, int(record["size"]), int(record["offset"]))
        except OSError as error:
            raise ShardError(f"{path}: sample {key} cannot be read: {error.strerror}") from None
        if len(data) != record["size"] or zlib.crc32(data) != record["crc32"]:
            raise ShardError(
                f"{path}: sample {key} is corrupt (its bytes do not have the index's crc32); copy the shard again, "
                f"or make it again from line {int(key) + 1} of {SOURCES}"
            )
        return Sample(data, int(record["label"]), key, sample_id, path)

    def _open_shard(self, shard: int, path: Path) -> tuple[int, np.memmap]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        index = self.shard_set.open_index(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path} cannot be opened: {error.strerror}") from None
        self._open[shard] = descriptor, index
        if len(self._open) > MAX_OPEN_SHARDS:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        return descriptor, index


def _close(open_shards: OrderedDict[int, tuple[int, np.memmap]]) -> None:
    for descriptor, _ in open_shards.values():
        os.close(descriptor)
