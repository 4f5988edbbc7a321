"""`dmae-shards verify DST`: read everything again and name what is not as manifest and index say.

Without --sample each tar is read from its first byte to its last and its index is worked out anew; with it,
so many samples of each shard are looked up through the index. The lists and the indexes' checksums are
compared in either case.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.header import read_header
from data_prep.scan import BLOCK
from data_prep.tars import REMOTE, Labels, open_tar, read_samples
from data_prep.workers import Workers, check_parent
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import (
    MANIFEST,
    RECORD,
    SKIPPED,
    SOURCES,
    ShardError,
    crc32,
    index_name,
    ustar_header,
)

MAX_SHOWN = 20


def verify_shards(dst: Path, *, sample: float = 1.0, workers: int = 1) -> None:
    """Print what was checked. Raises ShardError if anything differs, after printing what."""
    shard_set = ShardSet.open(dst, label="DST")
    made = json.loads((dst / MANIFEST).read_bytes())["made"] or {}
    differences = _check_lists(dst, made, shard_set.num_samples)
    jobs = [(shard_set, made, number, sample) for number in range(len(shard_set.shards))]
    num_read = 0
    with Workers(_work, workers) as pool, tqdm(total=len(jobs), unit=" shards", disable=None) as progress:
        for found, count in pool.run(jobs):
            differences += found
            num_read += count
            progress.update()
    for difference in sorted(differences)[:MAX_SHOWN]:
        print(difference)
    if differences:
        more = f", the first {MAX_SHOWN} above" if len(differences) > MAX_SHOWN else " above"
        raise ShardError(
            f"DST '{dst}' differs from its manifest in {len(differences):,} places{more}; copy those shards again"
        )
    print(
        f"{dst}: {num_read:,} of {shard_set.num_samples:,} samples in {len(jobs):,} shards read, all as written"
    )


def _work(job: tuple) -> tuple[tuple[list[str], int], Callable[[], None]]:
    return _check_shard(*job), lambda: None


def _check_lists(dst: Path, made: dict, num_samples: int) -> list[str]:
    differences = []
    if "sources_sha256" in made:
        digest, lines = hashlib.sha256(), 0
        try:
            with open(dst / SOURCES, "rb") as file:
                while piece := file.read(2**20):
                    digest.update(piece)
                    lines += piece.count(b"\n")
            if digest.hexdigest() != made["sources_sha256"] or lines != made["num_sources"]:
                differences.append(f"{SOURCES}: it is not the list that the set was made with")
        except FileNotFoundError:
            differences.append(f"{SOURCES}: missing")
    if "num_skipped" in made:
        try:
            lines = (dst / SKIPPED).read_bytes().count(b"\n")
        except FileNotFoundError:
            lines = 0
        if lines != made["num_skipped"]:
            differences.append(f"{SKIPPED}: found {lines:,} files, expected {made['num_skipped']:,}")
    return differences


def _check_shard(shard_set: ShardSet, made: dict, number: int, sample: float) -> tuple[list[str], int]:
    """Returns (differences, samples read)."""
    shard = shard_set.shards[number]
    text = (shard_set.folder / index_name(shard.name)).read_bytes()
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        return [f"{index_name(shard.name)}: not the index that the manifest knows"], 0
    try:
        records = np.array(shard_set.open_index(number))
    except ShardError as error:
        return [str(error)], 0
    base, ours = shard_set.base or str(shard_set.folder), made.get("by") == "dmae-shards make"
    try:
        with open_tar(base, shard.name) as file:
            if sample < 1:
                chosen = random.Random(number).sample(
                    range(len(records)), max(1, round(len(records) * sample)) if len(records) else 0
                )
                return list(_look_up(shard.name, file, records[sorted(chosen)], ours)), len(chosen)
            return _read_all(shard.name, file, shard.bytes, records, made, ours), len(records)
    except Exception as error:  # a remote file system has errors of its own
        if isinstance(error, OSError | ValueError) or REMOTE.match(base):
            return [f"{shard.name}: it cannot be read: {getattr(error, 'strerror', None) or error}"], 0
        raise


def _read_all(name: str, file, size: int, records: np.ndarray, made: dict, ours: bool) -> list[str]:
    labels = Labels(made.get("label") or "cls")
    differences, rows = [], iter(records)
    try:
        for found in read_samples(_Counted(file, size), image=made.get("image"), labels=labels):
            check_parent()
            if found.reason is not None and not ours:
                continue  # as in `index`, which skipped it
            row = next(rows, None)
            if row is None:
                differences.append(f"{name}: sample {found.key} is not in the index")
                continue
            key = f"{row['number']:09d}" if ours else found.key
            if found.key != key:
                return [*differences, f"{name}: found sample {found.key}, expected {key}"]
            if found.reason is not None:
                differences.append(f"{name}: sample {key}: {found.reason}")
                continue
            for field, value in zip(RECORD.names[1:], found.record(0)[1:], strict=True):
                if row[field] != value:
                    differences.append(
                        f"{name}: sample {key}: {field} is {value}, its index says {row[field]}"
                    )
    except ValueError as error:
        return [*differences, f"{name}: {error}"]
    missing = sum(1 for _ in rows)
    return [*differences, f"{name}: {missing} samples of its index are missing"] if missing else differences


def _look_up(name: str, file, records: np.ndarray, ours: bool) -> Iterator[str]:
    for row in records:
        check_parent()
        key, size = f"{row['number']:09d}", int(row["size"])
        file.seek(int(row["offset"]) - BLOCK)
        data = file.read(BLOCK + size)
        header, data = data[:BLOCK], data[BLOCK:]
        if len(data) != size or crc32(data) != row["crc32"]:
            yield f"{name}: sample {key}: its bytes do not have the index's crc32"
            continue
        extension, width, height = read_header(data, size)
        if (width, height) != (row["width"], row["height"]):
            yield f"{name}: sample {key}: found {width} x {height} pixels, its index says {row['width']} x {row['height']}"
        if not ours:
            continue
        tail = file.read(-size % BLOCK + 2 * BLOCK)[-size % BLOCK :]
        label = b"%d" % row["label"]
        expected = ustar_header(f"{key}.cls".encode(), len(label)) + label.ljust(BLOCK, b"\0")
        if header != ustar_header(f"{key}.{extension}".encode(), size) or tail != expected:
            yield f"{name}: sample {key}: its headers or its label are not those of the index"


class _Counted:
    """A file that must have as many bytes as the manifest says."""

    def __init__(self, file, size: int):
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0 or (not data and size and self._left):
            raise ValueError(f"it is {abs(self._left):,} bytes too {'long' if self._left < 0 else 'short'}")
        return data
