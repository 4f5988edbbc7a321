"""One shard of `make`, in a worker: files -> samples -> a tar and its index, in one pass over one reused buffer.

A file is read by one readv, its header checked and its crc32 taken while it is in the processor's cache, and
it leaves by one gathered write. A fresh buffer for each file made this slower than tar (measured).
"""

import functools
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.header import read_header
from data_prep.workers import check_parent
from dmae_ds.data.shards import SOURCES, NewSample, ShardError, draft_shard, index_name

MAX_BYTES = 2**28  # of a file: a buffer this large is what a worker can need
_buffer = bytearray(2**20)


@dataclass(frozen=True)
class Settings:
    """What happens to every image."""

    src: bytes
    dst: Path
    classes: list[str]
    decode: bool
    resize: int | None
    quality: int
    json: bool


@dataclass(frozen=True)
class Job:
    """One shard to write, or, if the journal has an entry for it, to check."""

    settings: Settings
    number: int
    name: str
    first: int  # number of the first sample
    offset: int  # of its line in sources.txt
    labels: array
    entry: dict | None


def work(job: Job) -> tuple[dict, Callable[[], None]]:
    """Returns (the shard's entry for the journal, commit). Raises ShardError if it cannot be written."""
    paths = _read_sources(job)
    if job.entry is not None and _is_done(job, paths):
        return job.entry, _do_nothing
    skipped: list[dict] = []
    kept, left = array("q"), array("q")  # size and time of each file
    try:
        shard, commit = draft_shard(job.settings.dst, job.name, _samples(job, paths, skipped, kept, left))
    except OSError as error:
        raise _cannot_write(job, error) from None
    entry = {
        "number": job.number,
        "shard": shard,
        "skipped": skipped,
        "source_bytes": sum(kept[::2]),
        "kept": _digest(kept),
        "left": _digest(left),
    }
    return entry, functools.partial(_commit, job, commit)


def _samples(
    job: Job, paths: list[bytes], skipped: list[dict], kept: array, left: array
) -> Iterator[NewSample]:
    settings = job.settings
    decode = settings.decode or settings.resize is not None
    for number, (path, label) in enumerate(zip(paths, job.labels, strict=True), start=job.first):
        check_parent()
        try:
            buffer, size, time_ns = read_file(b"%b/%b" % (settings.src, path))
            if not size:
                raise ValueError("empty")
            extension, width, height = read_header(buffer, size)
            data: bytes | memoryview = memoryview(buffer)[:size]
            if decode:
                data, extension, width, height = _decode(settings, data, extension, width, height)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            skipped.append({"number": number, "source": os.fsdecode(path), "reason": reason})
            left.extend(_look_at(settings, path))
            continue
        kept.append(size)
        kept.append(time_ns)
        meta = _describe(settings, path, label, width, height) if settings.json else None
        yield NewSample(number, extension, data, width, height, label, meta)


def read_file(path: bytes) -> tuple[bytearray, int, int]:
    """Returns (a buffer that begins with the file and is used again by the next call, the file's size, its time in ns).

    Raises OSError, or ValueError for what is no regular file, larger than MAX_BYTES or shrinks while it is
    read.
    """
    global _buffer
    descriptor = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # a pipe would wait for its other end
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


def _look_at(settings: Settings, path: bytes) -> tuple[int, int]:
    """Size and time of a file, by which a later run sees that it is another one."""
    try:
        status = os.stat(b"%b/%b" % (settings.src, path))
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _decode(settings: Settings, data: memoryview, extension: str, width: int, height: int) -> tuple:
    from data_prep.decode import check_pixels, shrink

    if settings.resize is not None:
        return shrink(data, short_side=settings.resize, quality=settings.quality)
    check_pixels(data)
    return data, extension, width, height


def _describe(settings: Settings, path: bytes, label: int, width: int, height: int) -> bytes:
    source, name = os.fsdecode(path), settings.classes[label] if label >= 0 else None
    return json.dumps(
        {"source": source, "class": name, "label": label, "width": width, "height": height}
    ).encode()


def _read_sources(job: Job) -> list[bytes]:
    with open(job.settings.dst / SOURCES, "rb") as file:
        file.seek(job.offset)
        lines = [file.readline() for _ in job.labels]
    return [line[1:-2] if b"\\" not in line else os.fsencode(json.loads(line)) for line in lines]


def _is_done(job: Job, paths: list[bytes]) -> bool:
    """Whether the shard that the journal names is there and its files are still those it was made of.

    Raises ShardError if files that it holds have changed; where only skipped ones have, it is made again.
    """
    entry, settings = job.entry, job.settings
    skipped = {item["number"] for item in entry["skipped"]}
    kept, left = array("q"), array("q")
    for number, path in enumerate(paths, start=job.first):
        check_parent()
        (left if number in skipped else kept).extend(_look_at(settings, path))
    if _digest(kept) != entry["kept"]:
        raise ShardError(
            f"files of SRC have changed since {job.name} was made of them (lines {job.first + 1} to "
            f"{job.first + len(paths)} of {SOURCES}); put them back, or start anew with --overwrite"
        )
    try:
        whole = os.stat(settings.dst / job.name).st_size == entry["shard"].bytes
        index = (settings.dst / index_name(job.name)).read_bytes()
    except FileNotFoundError:
        return False
    return (
        whole
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


def _cannot_write(job: Job, error: OSError) -> ShardError:
    path = job.settings.dst / job.name
    return ShardError(
        f"{path} cannot be written: {error.strerror}; mend that, and the same command continues"
    )


def _do_nothing() -> None:
    pass
