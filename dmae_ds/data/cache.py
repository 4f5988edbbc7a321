"""Bounded cache of remote shards on a local disk, in chunks of 1 MiB, shared by all processes of a node.

    CACHE/dmae_ds_shards/usage                           bytes in use, under a lock
    CACHE/dmae_ds_shards/<fingerprint>/<shard>/<chunk>   written under a temporary name, then renamed

A full cache keeps its chunks: every sample comes once an epoch in a new order, so a chunk that is kept is as
likely to be needed as one that would replace it, and the best possible hit rate is cache size / data size.
Only chunks of other data sets are removed to make room. Bytes from the cache are checked against the index's
crc32 like all others; a chunk that fails is dropped and fetched again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from dmae_ds.data.shards import ShardError

FOLDER = "dmae_ds_shards"  # nothing outside it is ever counted or removed
CHUNK_BYTES = 2**20
STALE_S = 3600.0  # a temporary file of this age was left by a killed process


def make_cache(folder: Path, fingerprint: str, *, limit_bytes: int) -> "ChunkCache":
    """Open the cache of one data set, count the bytes in use, and remove other data sets if they fill it.

    Raises ShardError if the folder cannot be written.
    """
    cache = ChunkCache(folder, fingerprint, limit_bytes=limit_bytes)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        with cache.locked() as usage:
            usage.value = _tidy(cache.root, keep=cache.folder.name, limit_bytes=limit_bytes)
    except OSError as error:
        raise ShardError(
            f"data.cache_dir '{folder}' cannot be used: {error.strerror}; choose another folder, or null"
        ) from None
    return cache


class _Usage:
    """Bytes in use, as a value that can be changed while it is locked."""

    def __init__(self, value: int):
        self.value = value


class ChunkCache:
    """Chunks of the files of one data set; no descriptor or lock is held between calls."""

    def __init__(self, folder: Path, fingerprint: str, *, limit_bytes: int):
        self.root, self.limit_bytes = folder / FOLDER, limit_bytes
        self.folder = self.root / fingerprint[:16]

    def read(
        self, name: str, offset: int, size: int, *, file_size: int, fetch: Callable[[int, int], bytes]
    ) -> bytes:
        """Read bytes [offset, offset + size) of a file, and `fetch(offset, size)` the missing chunks."""
        first, last = offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES
        chunks = {number: self._load(name, number, file_size) for number in range(first, last + 1)}
        missing = [number for number, data in chunks.items() if data is None]
        while missing:  # consecutive chunks in one request
            run = [number for place, number in enumerate(missing) if number == missing[0] + place]
            missing = missing[len(run) :]
            start = run[0] * CHUNK_BYTES
            data = fetch(start, min(file_size, (run[-1] + 1) * CHUNK_BYTES) - start)
            for place, number in enumerate(run):
                chunks[number] = data[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]
                self._store(name, number, chunks[number])
        start = first * CHUNK_BYTES
        return b"".join(chunks.values())[offset - start : offset - start + size]

    def forget(self, name: str, offset: int, size: int) -> None:
        """Remove the chunks that hold these bytes."""
        for number in range(offset // CHUNK_BYTES, (offset + size - 1) // CHUNK_BYTES + 1):
            path = self.folder / name / str(number)
            with suppress(OSError):
                freed = path.stat().st_size
                path.unlink()
                self._account(-freed)

    @contextmanager
    def locked(self):
        """Lock the count of bytes in use; it is written back when the block ends."""
        with open(self.root / "usage", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read(32)
            usage = _Usage(int(text) if text.isdigit() else 0)
            yield usage
            file.truncate(0)
            file.write(b"%d" % max(0, usage.value))  # mode "a" writes at the end of the emptied file

    def _load(self, name: str, number: int, file_size: int) -> bytes | None:
        try:
            data = (self.folder / name / str(number)).read_bytes()
        except OSError:
            return None
        if len(data) == min(CHUNK_BYTES, file_size - number * CHUNK_BYTES):
            return data
        self.forget(name, number * CHUNK_BYTES, 1)  # cut short by a crash of the machine
        return None

    def _store(self, name: str, number: int, data: bytes) -> None:
        """Keep a chunk if there is room; a write that fails is ignored, and the chunk is not cached."""
        if not self._account(len(data)):
            return
        path = self.folder / name / str(number)
        temporary = path.with_name(f"{number}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        kept = False
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                kept = not path.exists()  # otherwise another process was faster
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        if not kept:
            self._account(-len(data))

    def _account(self, change: int) -> bool:
        """Add to the bytes in use; returns False if that would exceed the limit."""
        with suppress(OSError), self.locked() as usage:
            if change > 0 and usage.value + change > self.limit_bytes:
                return False
            usage.value += change
            return True
        return False


def _tidy(root: Path, *, keep: str, limit_bytes: int) -> int:
    """Remove files of killed processes, then whole data sets other than `keep` if they fill the cache.

    The data set used longest ago goes first, until half of the limit is free or none is left. Returns the
    bytes in use.
    """
    used: dict[Path, int] = {}
    for folder in root.iterdir():
        if not folder.is_dir() or folder.is_symlink():
            continue
        used[folder] = 0
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                if path.suffix == ".tmp" and time.time() - status.st_mtime > STALE_S:
                    path.unlink()
                elif not path.is_dir():
                    used[folder] += status.st_size
    others = [folder for folder in used if folder.name != keep]
    for folder in sorted(others, key=lambda folder: folder.stat().st_mtime):
        total = sum(used.values())
        if total - used.get(root / keep, 0) <= limit_bytes // 2 and total <= limit_bytes:
            break
        shutil.rmtree(folder, ignore_errors=True)
        del used[folder]
    os.utime(root / keep)
    return sum(used.values())
