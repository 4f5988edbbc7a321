"""Convert one shard of `make` in a worker: files to a tar and its index, over one reused buffer.

A file is read by one readv, its header is checked and its crc32 computed while it is in the processor's
cache, and it is written by one gathered write. A new buffer for each file made this slower than tar
(measured).
"""

import functools
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.convert_dense import convert_dense
from data_prep.dense import DenseSettings, map_file
from data_prep.files import read_file, size_and_time
from data_prep.header import MAX_SHRUNK_PIXELS, find_mode, read_header
from data_prep.target import OtherSetError, open_bucket
from data_prep.workers import check_parent
from dmae_ds.data.arrays import describe_array, read_array_header
from dmae_ds.data.shards import ANNOTATIONS, SOURCES, NewSample, ShardError, draft_shard, index_name

TINY = 16  # px of a side, below which an image is counted as such


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
    dense: DenseSettings | None = None


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
    annotations_offset: int | None = None  # of the first sample's line in ANNOTATIONS


def work(job: Job) -> tuple[dict, Callable[[], None]]:
    """Write one shard; returns (its entry for the journal, commit). Raises ShardError."""
    paths = _read_sources(job)
    if job.entry is not None and _is_done(job, paths):
        return job.entry, _do_nothing
    skipped: list[dict] = []
    kept, left = array("q"), array("q")  # sizes and times of the files in the shard, and of skipped ones
    modes: Counter = Counter()
    samples = _samples(job, paths, skipped, kept, left, modes)
    try:
        is_dense = job.settings.dense is not None
        shard, commit = draft_shard(job.settings.dst, job.name, samples, dense=is_dense)
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
    lines = _read_annotations(job)
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
            kinds = {find_mode(buffer, size)} if extension == "png" else set()
            if extension == "npy":
                kinds = {describe_array(read_array_header(buffer, size))}
            elif min(width, height) < TINY:
                kinds.add("tiny")
            data: bytes | memoryview = memoryview(buffer)[:size]
            if settings.dense is not None:
                converted = convert_dense(
                    settings, path, lines.get(number), (bytes(data), extension, width, height)
                )
                data, extension, width, height = converted.image
            elif decode:
                data, extension, width, height = _decode(settings, data, (extension, width, height), kinds)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            skipped.append({"number": number, "source": os.fsdecode(path), "reason": reason})
            left.extend(_sizes_and_times(settings, path))
            continue
        modes.update(kinds - {None})
        kept.append(size)
        kept.append(time_ns)
        meta = _describe(settings, path, label, width, height) if settings.json else None
        if settings.dense is None:
            yield NewSample(number, extension, data, width, height, label, meta)
            continue
        kept.extend(converted.map_size_and_time)
        modes.update(converted.modes)
        yield NewSample(
            number, extension, data, width, height, label, meta, converted.label_map, converted.annotations
        )


def one_kind(kinds: Counter, dst: Path) -> str:
    """What all arrays are: `arrays of 4 channels, 16 bits`. Raises ShardError for several kinds."""
    if len(kinds) > 1:
        found = "; ".join(f"{number:,} {kind}" for kind, number in sorted(kinds.items()))
        raise ShardError(
            f"SRC has {found}; a set has one kind: convert or move the others, and remove '{dst}'"
        )
    return next(iter(kinds))


def _decode(settings: Settings, data: memoryview, header: tuple[str, int, int], kinds: set) -> tuple:
    """Decode an image, and shrink it if --resize is given; returns (bytes, extension, width, height).

    header: (extension, width, height)
    kinds: of the image, to which `blank` is added where it is
    """
    from data_prep.decode import check_pixels, shrink

    if header[0] == "npy":
        return data, *header  # its header says that it is whole
    if settings.resize is not None:
        return shrink(data, short_side=settings.resize, quality=settings.quality)
    if check_pixels(data):
        kinds.add("blank")
    return data, *header


def _describe(settings: Settings, path: bytes, label: int, width: int, height: int) -> bytes:
    """Content of a sample's .json member."""
    name = settings.classes[label] if label >= 0 else None
    fields = {"source": os.fsdecode(path), "class": name, "label": label, "width": width, "height": height}
    return json.dumps(fields).encode()


def _sizes_and_times(settings: Settings, path: bytes) -> tuple[int, ...]:
    """Size and time of an image, and of its map where it has one."""
    facts = size_and_time(b"%b/%b" % (settings.src, path))
    if settings.dense is None or settings.dense.masks is None:
        return facts
    return facts + size_and_time(map_file(settings.dense.masks, path))


def _read_annotations(job: Job) -> dict[int, bytes]:
    """Lines of a shard's samples in ANNOTATIONS, by the samples' numbers; empty without a COCO file."""
    if job.annotations_offset is None:
        return {}
    with open(job.settings.dst / ANNOTATIONS, "rb") as file:
        file.seek(job.annotations_offset)
        return {number: file.readline() for number in range(job.first, job.first + len(job.labels))}


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
        (left if number in skipped else kept).extend(_sizes_and_times(settings, path))
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
