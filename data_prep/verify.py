"""Read a shard folder again and list what differs from manifest and index: `dmae-shards verify DST`.

Without --sample each tar is read from its first byte to its last and its index is computed again; with it, a
share of each shard's samples is read through the index. The lists and the indexes' checksums are compared in
both cases.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data_prep.header import read_header
from data_prep.members import DenseMembers
from data_prep.scan import BLOCK
from data_prep.tars import REMOTE, Labels, open_tar, read_samples
from data_prep.workers import Workers, check_parent
from dmae_ds.data.shard_set import HEADER_BYTES, MANIFEST_BYTES, ShardSet
from dmae_ds.data.shards import (
    DENSE_MEMBERS,
    DENSE_RECORD,
    MANIFEST,
    SKIPPED,
    SOURCES,
    ShardError,
    crc32,
    index_name,
    ustar_header,
)
from dmae_ds.data.storage import LocalFolder, RemoteFolder

OURS = "dmae-shards make"
MAX_SHOWN = 20
PIECE_BYTES = 2**24
_opened: dict[str, ShardSet] = {}  # of a worker, with its connections: each job brings the set again


def verify_shards(dst: Path | str, *, sample: float = 1.0, workers: int = 1) -> None:
    """Compare a folder with its manifest; print the differences. Raises ShardError if there are any.

    dst: a folder, or its URL as a str
    """
    shard_set = ShardSet.open(dst, label="DST")
    made = json.loads(shard_set.indexes.read_all(MANIFEST, limit=MANIFEST_BYTES))["made"] or {}
    differences = _check_lists(shard_set.indexes, made)
    jobs = [(shard_set, made, number, sample) for number in range(len(shard_set.shards))]
    num_read = 0
    with Workers(_work, workers) as pool, tqdm(total=len(jobs), unit=" shards", disable=None) as progress:
        for shard_differences, count in pool.run(jobs):
            differences += shard_differences
            num_read += count
            progress.update()
    for difference in sorted(differences)[:MAX_SHOWN]:
        print(difference)
    if differences:
        more = f", the first {MAX_SHOWN} above" if len(differences) > MAX_SHOWN else " above"
        raise ShardError(
            f"DST '{dst}' differs from its manifest in {len(differences):,} places{more}; copy these shards "
            f"again, or repeat `{made.get('by', 'dmae-shards make')}` with --overwrite"
        )
    print(
        f"{dst}: read {num_read:,} of {shard_set.num_samples:,} samples in {len(jobs):,} shards, no "
        f"differences"
    )


def _work(job: tuple) -> tuple[tuple[list[str], int], Callable[[], None]]:
    shard_set, *rest = job
    shard_set = _opened.setdefault(str(shard_set.folder), shard_set)
    return _check_shard(shard_set, *rest), lambda: None


def _check_lists(folder: LocalFolder | RemoteFolder, made: dict) -> list[str]:
    """Differences of sources.txt and skipped.jsonl."""
    differences = []
    sizes = folder.sizes([SOURCES, SKIPPED])
    if "sources_sha256" in made:
        digest, lines = hashlib.sha256(), 0
        for piece in _pieces(folder, SOURCES, sizes.get(SOURCES, 0)):
            digest.update(piece)
            lines += piece.count(b"\n")
        if SOURCES not in sizes:
            differences.append(f"{SOURCES}: missing")
        elif digest.hexdigest() != made["sources_sha256"] or lines != made["num_sources"]:
            differences.append(f"{SOURCES}: not the list that the set was made with")
    if "num_skipped" in made:
        lines = sum(piece.count(b"\n") for piece in _pieces(folder, SKIPPED, sizes.get(SKIPPED, 0)))
        if lines != made["num_skipped"]:
            differences.append(f"{SKIPPED}: found {lines:,} files, expected {made['num_skipped']:,}")
    return differences


def _pieces(folder: LocalFolder | RemoteFolder, name: str, size: int) -> Iterator[bytes]:
    """The content of a file, piece by piece; nothing for an empty or missing one."""
    if size:
        file = folder.open(name, size=size)
        for offset in range(0, size, PIECE_BYTES):
            yield file.read(offset, min(PIECE_BYTES, size - offset))


def _check_shard(shard_set: ShardSet, made: dict, number: int, sample: float) -> tuple[list[str], int]:
    """Compare one shard with its index and manifest; returns (differences, samples read)."""
    shard = shard_set.shards[number]
    limit = HEADER_BYTES + shard.num_samples * shard_set.record.itemsize
    text = shard_set.indexes.read_all(index_name(shard.name), limit=limit)
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        return [f"{index_name(shard.name)}: not the index of the manifest"], 0
    try:
        records = np.array(shard_set.open_index(number))
    except ShardError as error:
        return [str(error)], 0
    base, is_ours = shard_set.base or str(shard_set.folder), made.get("by") == OURS
    try:
        with open_tar(base, shard.name) as file:
            if sample < 1:
                num_rows = min(len(records), max(1, round(len(records) * sample)))
                rows = sorted(random.Random(number).sample(range(len(records)), num_rows))
                return list(_look_up(shard.name, file, records[rows], is_ours)), num_rows
            dense = None if shard_set.dense is None else DenseMembers(shard_set.dense)
            return _read_all(shard.name, file, shard.bytes, records, made, dense), len(records)
    except Exception as error:  # a remote file system has errors of its own
        if isinstance(error, OSError | ValueError) or REMOTE.match(base):
            return [f"{shard.name}: cannot be read: {getattr(error, 'strerror', None) or error}"], 0
        raise


def _read_all(
    name: str,
    file: BinaryIO,
    size: int,
    records: np.ndarray,
    made: dict,
    dense: DenseMembers | None,
) -> list[str]:
    """Differences between a whole tar and its index."""
    labels, is_ours = Labels(made.get("label") or "cls"), made.get("by") == OURS
    image = "npy" if made.get("arrays") else made.get("image")
    differences, rows = [], iter(records)
    try:
        for sample in read_samples(_Counted(file, size), image=image, labels=labels, dense=dense):
            if sample.reason is not None and not is_ours:
                continue  # `index` skipped it, too
            row = next(rows, None)
            if row is None:
                differences.append(f"{name}: sample {sample.key} is not in the index")
                continue
            key = f"{row['number']:09d}" if is_ours else sample.key
            if sample.key != key:
                return [*differences, f"{name}: found sample {sample.key}, expected {key}"]
            if sample.reason is not None:
                differences.append(f"{name}: sample {key}: {sample.reason}")
                continue
            for field, value in zip(records.dtype.names[1:], sample.record(0)[1:], strict=True):
                if row[field] != value:
                    differences.append(f"{name}: sample {key}: {field} is {value}, in its index {row[field]}")
    except ValueError as error:
        return [*differences, f"{name}: {error}"]
    num_missing = sum(1 for _ in rows)
    if num_missing:
        differences.append(f"{name}: {num_missing} samples of its index are missing")
    return differences


def _look_up(name: str, file: BinaryIO, records: np.ndarray, is_ours: bool) -> Iterator[str]:
    """Differences between some samples of a tar and their records."""
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
            expected = f"{row['width']} x {row['height']}"
            yield f"{name}: sample {key}: found {width} x {height} pixels, in its index {expected}"
        for member in DENSE_MEMBERS if records.dtype == DENSE_RECORD else ():
            file.seek(int(row[f"{member}_offset"]))
            data = file.read(int(row[f"{member}_size"]))
            if crc32(data) != row[f"{member}_crc32"]:
                yield f"{name}: sample {key}: its .{DENSE_MEMBERS[member]} does not have the index's crc32"
        if not is_ours:
            continue
        file.seek(int(row["offset"]) + size)
        tail = file.read(-size % BLOCK + 2 * BLOCK)[-size % BLOCK :]
        label = b"%d" % row["label"]
        expected_header = ustar_header(f"{key}.{extension}".encode(), size)
        expected_tail = ustar_header(f"{key}.cls".encode(), len(label)) + label.ljust(BLOCK, b"\0")
        if header != expected_header or tail != expected_tail:
            yield f"{name}: sample {key}: its headers or its label differ from the index"


class _Counted:
    """A file that must have the number of bytes in the manifest."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0 or (not data and size and self._left):
            raise ValueError(
                f"the tar is {abs(self._left):,} bytes too {'long' if self._left < 0 else 'short'}"
            )
        return data
