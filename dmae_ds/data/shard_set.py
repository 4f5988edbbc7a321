"""A finished shard folder, local or behind a URL, with checked manifest and file sizes.

Without torch.
"""

import bisect
import hashlib
import io
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmae_ds.data.dense_members import DenseInfo
from dmae_ds.data.shards import (
    DENSE_RECORD,
    MANIFEST,
    RECORD,
    VERSION,
    Shard,
    ShardError,
    compute_fingerprint,
    index_name,
    is_shard_name,
)
from dmae_ds.data.storage import Access, LocalFolder, RemoteFolder, is_url, open_folder

MANIFEST_BYTES = 2**28  # upper limit; a million shards need 2**27
DEFAULT_ACCESS = Access()
HEADER_BYTES = 4096  # upper limit of an index's header, which has some hundred bytes


@dataclass(frozen=True)
class ShardSet:
    """A finished shard folder, whose sample ids are 0 to num_samples - 1."""

    folder: Path | str  # holds manifest and indexes; a str is a URL
    classes: list[str]  # empty: every label is -1
    seed: int | None  # of the shuffle into shards; None: the tars were not made by dmae-shards
    images: str  # "original", or how the images were changed before they were stored
    base: str | None  # where the tars are; None: in `folder`; otherwise an absolute path or a URL
    dense: DenseInfo | None  # what samples of a dense set have next to their image
    shards: list[Shard]
    fingerprint: str
    ends: list[int]  # ends[s]: the number of samples in shards 0 to s
    indexes: LocalFolder | RemoteFolder  # `folder`
    tars: LocalFolder | RemoteFolder  # the folder of the tars
    checked: set[int]  # shards whose index this process compared with the manifest's sha256

    @classmethod
    def open(cls, folder: str | Path, *, label: str, access: Access = DEFAULT_ACCESS) -> "ShardSet":
        """Open a folder after checking its manifest and the sizes of its files.

        Only the manifest is read; sizes come from a listing or, over HTTP, from one request a file.
        label: the user's name for this folder, such as 'data.train'; access: how URLs are read
        Raises ShardError for a folder that cannot be used.
        """
        folder = str(folder).rstrip("/") if is_url(folder) else Path(folder)
        make = f"`dmae-shards make SRC {folder}`"
        if is_url(folder):
            make = "`dmae-shards make SRC DST`, and copy DST there"
        indexes = open_folder(folder, access=access, label=label)
        try:
            text = indexes.read_all(MANIFEST, limit=MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(
                f"{label} '{folder}' is not a shard folder: no {MANIFEST} there; make one with {make}"
            ) from None
        except OSError as error:
            raise ShardError(f"{label} '{folder}' cannot be read: {error.strerror}") from None
        try:
            parsed = _parse_manifest(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{label} '{folder}': {MANIFEST} is unusable: {error}; make it again with {make}"
            ) from None
        shards, base = parsed["shards"], parsed["base"]
        tars = indexes
        if base is not None:
            tars = open_folder(base, access=access, label=f"{label}: base of {MANIFEST}")
        if tars.is_remote:
            tars.use_cache(parsed["fingerprint"])
        _check_files(
            shards, indexes, tars, where=f"{label} '{folder}'", way_out=f"copy it again or run {make}"
        )
        ends = list(itertools.accumulate(shard.num_samples for shard in shards))
        return cls(folder=folder, ends=ends, indexes=indexes, tars=tars, checked=set(), **parsed)

    order_guarantee = "every image once an epoch, in a new order each epoch"

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return self.ends[-1]

    @property
    def record(self) -> np.dtype:
        """Type of the indexes' rows."""
        return RECORD if self.dense is None else DENSE_RECORD

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Find a sample; returns (shard number, row in its index)."""
        shard = bisect.bisect_right(self.ends, sample_id)
        if sample_id < 0 or shard == len(self.ends):
            raise IndexError(f"sample id {sample_id} of {self.num_samples} samples")
        return shard, sample_id - (self.ends[shard - 1] if shard else 0)

    def open_index(self, shard: int) -> np.ndarray:
        """Rows of one shard's index, [num_samples] of `record`, compared with the manifest the first time.

        A local index is mapped, with a descriptor for as long as the records are used; a remote one is in
        memory.
        """
        name, digest = index_name(self.shards[shard].name), self.shards[shard].index_sha256
        path, count, record = self.indexes.path(name), self.shards[shard].num_samples, self.record
        try:
            if self.indexes.is_remote:
                data = self.indexes.read_all(name, limit=HEADER_BYTES + count * record.itemsize)
                _check_digest(data, digest)
                records = np.frombuffer(data, record, count, _check_header(data, count, record))
            else:
                with open(path, "rb") as file:
                    if shard not in self.checked:
                        _check_digest(file, digest)
                    file.seek(0)
                    start = _check_header(file.read(HEADER_BYTES), count, record)
                records = np.empty(0, record)
                if count:
                    records = np.memmap(path, record, mode="r", offset=start, shape=(count,))
                records = records.view(np.ndarray)  # the same memory; indexing a memmap takes microseconds
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the index cannot be read ({error}); copy it again") from None
        if shard not in self.checked:
            _check_records(records, self.shards[shard].bytes, path)
            self.checked.add(shard)
        return records


def _check_files(
    shards: list[Shard],
    indexes: LocalFolder | RemoteFolder,
    tars: LocalFolder | RemoteFolder,
    *,
    where: str,
    way_out: str,
) -> None:
    """Raise ShardError for a shard that is missing or has another size, before training begins."""
    index_names, tar_names = [index_name(shard.name) for shard in shards], [shard.name for shard in shards]
    try:
        if tars is indexes:
            sizes = tars.sizes([*tar_names, *index_names])
        else:
            sizes = {**indexes.sizes(index_names), **tars.sizes(tar_names)}
    except OSError as error:
        raise ShardError(f"{where} cannot be read: {error.strerror}") from None
    for shard in shards:
        for name in (shard.name, index_name(shard.name)):
            if name not in sizes:
                raise ShardError(f"{where}: {name} is missing; {way_out}")
        if sizes[shard.name] != shard.bytes:
            raise ShardError(
                f"{where}: {shard.name} has {sizes[shard.name]:,} bytes, expected {shard.bytes:,} "
                f"({MANIFEST}); {way_out}"
            )


def _check_digest(data: "bytes | io.BufferedReader", expected: str) -> None:
    """Raise ValueError unless the sha256 is the expected one."""
    digest = hashlib.sha256(data) if isinstance(data, bytes) else hashlib.sha256()
    if not isinstance(data, bytes):
        while piece := data.read(2**20):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise ValueError("its sha256 is not that of the manifest")


def _check_records(records: np.ndarray, num_bytes: int, path: str) -> None:
    """Raise ShardError for a record that lies outside its tar."""
    inside = np.ones(len(records), bool)
    prefixes = ("", "seg_", "ann_") if records.dtype == DENSE_RECORD else ("",)
    for prefix in prefixes:
        offset, size = records[f"{prefix}offset"], records[f"{prefix}size"].astype(np.uint64)
        inside &= (size <= num_bytes) & (
            offset <= np.uint64(num_bytes) - np.minimum(size, np.uint64(num_bytes))
        )
    if not inside.all():
        raise ShardError(
            f"{path}: row {int(np.argmin(inside))} lies outside its tar of {num_bytes:,} bytes; index the "
            f"tars again"
        )


def _check_header(data: bytes, count: int, record: np.dtype) -> int:
    """Offset of the records in a .npy file. Raises ValueError unless its header is the one numpy writes.

    np.load would reserve the memory that a header asks for, and map objects; its parser is Python's own,
    which raises nearly any exception, and in Python 3.11 fails if a traceback is formatted at the same time.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    expected = f"{{'descr': {record.descr}, 'fortran_order': False, 'shape': ({count},), }}"
    if data[:8] != b"\x93NUMPY\x01\x00" or data[10:start].rstrip() != expected.encode():
        header = data[10:start][:400].decode("ascii", "replace").strip()
        raise ValueError(f"found {header!r}, expected the .npy header {expected}")
    return start


def _parse_manifest(text: bytes) -> dict:
    """Parse a manifest into fields of ShardSet. Raises ValueError that names the wrong part."""

    def check(is_good: bool, reason: str) -> None:
        if not is_good:
            raise ValueError(reason)

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0  # type(): a bool is not a count

    manifest = json.loads(text)
    check(isinstance(manifest, dict), f"found a {type(manifest).__name__}, expected an object")
    version = manifest.get("version")
    check(version == VERSION, f"found format version {version!r}, expected {VERSION}")
    classes, seed, entries = manifest.get("classes"), manifest.get("seed"), manifest.get("shards")
    check(
        isinstance(classes, list) and all(isinstance(c, str) for c in classes),
        "classes is not a list of names",
    )
    check(seed is None or type(seed) is int, f"seed is {seed!r}, expected an integer or null")
    images, base = manifest.get("images"), manifest.get("base")
    check(isinstance(images, str), f"images is {images!r}, expected a string")
    good = base is None or (
        isinstance(base, str) and re.match("/|https?://|s3://|gs://|hf://", base) is not None
    )
    check(good, f"base is {base!r}, expected null, an absolute path or a URL")
    check(isinstance(entries, list), "shards is not a list")
    shards = []
    fields = list(Shard.__dataclass_fields__)
    for number, entry in enumerate(entries):
        check(
            isinstance(entry, dict) and set(entry) == set(fields),
            f"shard {number} does not have the fields {fields}",
        )
        shard = Shard(**entry)
        check(is_shard_name(shard.name), f"shard {number} is named {shard.name!r}, expected NAME.tar")
        good = is_count(shard.num_samples) and is_count(shard.bytes)
        check(good, f"num_samples or bytes of {shard.name} is not a count")
        shards.append(shard)
    check(len({shard.name for shard in shards}) == len(shards), "it lists a shard twice")
    num_samples, total = manifest.get("num_samples"), sum(shard.num_samples for shard in shards)
    check(total > 0, "it lists no samples")
    check(num_samples == total, f"num_samples is {num_samples!r}, its shards hold {total}")
    dense = None if manifest.get("dense") is None else DenseInfo.parse(manifest["dense"])
    fingerprint = compute_fingerprint(classes, shards, manifest.get("dense"))
    check(
        manifest.get("fingerprint") == fingerprint, "it does not match its own fingerprint (was it edited?)"
    )
    return {
        "classes": classes,
        "seed": seed,
        "images": images,
        "base": base,
        "dense": dense,
        "shards": shards,
        "fingerprint": fingerprint,
    }
