"""Convert one shard of `make` in a worker: files to a tar and its index, over one reused buffer.

A file is read by one readv, its header is checked and its crc32 computed while it is in the processor's
cache, and it is written by one gathered write. A new buffer for each file made this slower than tar
(measured).
"""

import functools
import hashlib
import json
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.header import MAX_SHRUNK_PIXELS, find_mode, read_header
from data_prep.target import OtherSetError, open_bucket
from data_prep.workers import check_parent
from dmae_ds.data.arrays import describe_array, read_array_header
from dmae_ds.data.shards import SOURCES, NewSample, ShardError, draft_shard, index_name

MAX_BYTES = 2**28  # largest file, and so the largest buffer of a worker
_buffer = bytearray(2**20)


@dataclass(frozen=True)
class Settings:
    """Settings of a conversion that every worker needs."""

    src: bytes
    dst: Path  # where shards are made
    url: str | None  # where they are uploaded to
    classes: list[str]
    decode: bool
    resize: int | None
    arrays: bool
    quality: int
    json: bool


@dataclass(frozen=True)
class Job:
    """One shard to write, or to check if the journal has an entry for it."""

    settings: Settings
    number: int
    name: str
    first: int  # number of the first sample
    offset: int  # of its line in sources.txt
    labels: array
    entry: dict | None


def work(job: Job) -> tuple[dict, Callable[[], None]]:
    """Write one shard; returns (its entry for the journal, commit). Raises ShardError."""
    paths = _read_sources(job)
    if job.entry is not None and _is_done(job, paths):
        return job.entry, _do_nothing
    skipped: list[dict] = []
    kept, left = array("q"), array("q")  # size and time of each file in the shard, and of each skipped file
    modes: Counter = Counter()
    samples = _samples(job, paths, skipped, kept, left, modes)
    try:
        shard, commit = draft_shard(job.settings.dst, job.name, samples)
    except OSError as error:
        raise _cannot_write(job, error) from None
    entry = {
        "number": job.number,
        "shard": shard,
        "skipped": skipped,
        "source_bytes": sum(kept[::2]),
        "kept": _digest(kept),
        "left": _digest(left),
        "modes": dict(modes),
    }
    return entry, functools.partial(_commit, job, commit)


def _samples(
    job: Job, paths: list[bytes], skipped: list[dict], kept: array, left: array, modes: Counter
) -> Iterator[NewSample]:
    """Read the images of a shard; files that cannot be used are added to `skipped`."""
    settings = job.settings
    max_pixels = None if settings.resize is None else MAX_SHRUNK_PIXELS
    decode = settings.decode or settings.resize is not None
    for number, (path, label) in enumerate(zip(paths, job.labels, strict=True), start=job.first):
        check_parent()
        try:
            buffer, size, time_ns = read_file(b"%b/%b" % (settings.src, path))
            if not size:
                raise ValueError("empty")
            extension, width, height = read_header(buffer, size, max_pixels=max_pixels)
            if (extension == "npy") != settings.arrays:
                raise ValueError(
                    "a .npy array, which requires --arrays" if extension == "npy" else "no array"
                )
            mode = find_mode(buffer, size) if extension == "png" else None
            if extension == "npy":
                mode = describe_array(read_array_header(buffer, size))
            data: bytes | memoryview = memoryview(buffer)[:size]
            if decode:
                data, extension, width, height = _decode(settings, data, extension, width, height)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            skipped.append({"number": number, "source": os.fsdecode(path), "reason": reason})
            left.extend(_size_and_time(settings, path))
            continue
        if mode is not None:
            modes[mode] += 1
        kept.append(size)
        kept.append(time_ns)
        meta = _describe(settings, path, label, width, height) if settings.json else None
        yield NewSample(number, extension, data, width, height, label, meta)


def read_file(path: bytes) -> tuple[bytearray, int, int]:
    """Read a file; returns (a buffer that begins with the file, its size, its time in ns).

    The next call reuses the buffer. Raises OSError, or ValueError for a file that is not regular, is larger
    than MAX_BYTES or shrinks while it is read.
    """
    global _buffer
    # without O_NONBLOCK, opening a pipe waits for its other end
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        if size > len(_buffer):
            _buffer = bytearray(1 << (size - 1).bit_length())
        view = memoryview(_buffer)
        done = os.readv(descriptor, (view[:size],)) if size else 0
        while done < size:
            count = os.readv(descriptor, (view[done:size],))
            if not count:
                raise ValueError(f"it shrank while it was read, from {size:,} to {done:,} bytes")
            done += count
    finally:
        os.close(descriptor)
    return _buffer, size, status.st_mtime_ns


def one_kind(kinds: Counter, dst: Path) -> str:
    """What all arrays are: `arrays of 4 channels, 16 bits`. Raises ShardError for several kinds."""
    if len(kinds) > 1:
        found = "; ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()))
        raise ShardError(
            f"SRC has {found}; a set has one kind: convert or move the others, and remove '{dst}'"
        )
    return next(iter(kinds))


def _size_and_time(settings: Settings, path: bytes) -> tuple[int, int]:
    """Size and time of a file, by which a later run sees that it has changed."""
    try:
        status = os.stat(b"%b/%b" % (settings.src, path))
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _decode(settings: Settings, data: memoryview, extension: str, width: int, height: int) -> tuple:
    """Decode an image, and shrink it if --resize is given; returns (bytes, extension, width, height)."""
    from data_prep.decode import check_pixels, shrink

    if extension == "npy":
        return data, extension, width, height  # its header says that it is whole
    if settings.resize is not None:
        return shrink(data, short_side=settings.resize, quality=settings.quality)
    check_pixels(data)
    return data, extension, width, height


def _describe(settings: Settings, path: bytes, label: int, width: int, height: int) -> bytes:
    """Content of a sample's .json member."""
    name = settings.classes[label] if label >= 0 else None
    fields = {"source": os.fsdecode(path), "class": name, "label": label, "width": width, "height": height}
    return json.dumps(fields).encode()


def _read_sources(job: Job) -> list[bytes]:
    """Paths of a shard's files, from sources.txt."""
    with open(job.settings.dst / SOURCES, "rb") as file:
        file.seek(job.offset)
        lines = [file.readline() for _ in job.labels]
    return [line[1:-2] if b"\\" not in line else os.fsencode(json.loads(line)) for line in lines]


def _is_done(job: Job, paths: list[bytes]) -> bool:
    """Whether a shard of the journal exists and its source files are unchanged.

    Raises ShardError if files in the shard have changed; if only skipped ones have, the shard is made again.
    """
    entry, settings = job.entry, job.settings
    skipped = {item["number"] for item in entry["skipped"]}
    kept, left = array("q"), array("q")
    for number, path in enumerate(paths, start=job.first):
        check_parent()
        (left if number in skipped else kept).extend(_size_and_time(settings, path))
    if _digest(kept) != entry["kept"]:
        raise OtherSetError(
            f"files of SRC have changed since {job.name} was made (lines {job.first + 1} to "
            f"{job.first + len(paths)} of {SOURCES}); restore them, or start again with --overwrite"
        )
    try:
        if settings.url is None:
            num_bytes = os.stat(settings.dst / job.name).st_size
        else:
            num_bytes = open_bucket(settings.url).size(job.name)
        has_size = num_bytes == entry["shard"].bytes
        index = (settings.dst / index_name(job.name)).read_bytes()
    except FileNotFoundError:
        return False
    return (
        has_size
        and _digest(left) == entry["left"]
        and hashlib.sha256(index).hexdigest() == entry["shard"].index_sha256
    )


def _digest(numbers: array) -> str:
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def _commit(job: Job, commit: Callable[[], None]) -> None:
    try:
        commit()
    except OSError as error:
        raise _cannot_write(job, error) from None
    if job.settings.url is not None:
        bucket, tar = open_bucket(job.settings.url), job.settings.dst / job.name
        bucket.put(tar.with_name(index_name(job.name)))
        bucket.put(tar)
        tar.unlink()


def _cannot_write(job: Job, error: OSError) -> ShardError:
    path = job.settings.dst / job.name
    return ShardError(
        f"{path} cannot be written: {error.strerror}; solve this, then run the same command to continue"
    )


def _do_nothing() -> None:
    """Commit of a shard that was already written."""
