"""The shard folder on disk: plain WebDataset tars, and beside each an index for reading a sample by one `pread`.

    shard-000000.tar         ustar; members 000000000.jpg (or .png), 000000000.cls, 000000001.jpg, ...
    shard-000000.index.npy   one RECORD a sample, in the order of the tar
    sources.txt              line k + 1: the file that key k was made of, as a JSON string
    skipped.jsonl            the files left out and why; only there if a file was left out
    manifest.json            written last: a folder without it is unfinished

A key is the 9-digit number of the sample. Numbers rise but may have gaps (skipped files), so training counts in sample
ids: 0 to num_samples - 1, shards and rows in order. Any WebDataset reader can use the tars without the rest.
`dmae-shards make SRC DST` writes such a folder. No torch here: the shard tool imports this module.
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dmae_ds.errors import UserError

VERSION = 1
MANIFEST, SOURCES, SKIPPED = "manifest.json", "sources.txt", "skipped.jsonl"
SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar")
RECORD = np.dtype([
    ("number", "<u8"),  # the key
    ("offset", "<u8"),  # of the image's first byte in the tar
    ("size", "<u4"),  # of the image in bytes
    ("crc32", "<u4"),  # of the image's bytes
    ("width", "<u4"),
    ("height", "<u4"),
    ("label", "<i4"),
])


class ShardError(UserError):
    """A shard folder, a shard or a sample that cannot be used: where, what was found, what to do."""


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest lists it."""

    name: str
    num_samples: int
    bytes: int
    index_sha256: str


@dataclass(frozen=True)
class NewSample:
    """One sample on its way into a shard."""

    number: int
    extension: str  # jpg or png
    data: bytes
    width: int
    height: int
    label: int


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".index.npy"


# ---- writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_shard(folder: Path, name: str, samples: Iterable[NewSample]) -> Shard:
    """Write one tar and its index. Equal samples give equal bytes."""
    records = []
    with replacing(folder / name) as file:
        for sample in samples:
            key = f"{sample.number:09d}"
            offset = file.tell() + tarfile.BLOCKSIZE  # the payload follows its header
            _write_member(file, f"{key}.{sample.extension}", sample.data)
            _write_member(file, f"{key}.cls", b"%d" % sample.label)
            size, crc32 = len(sample.data), zlib.crc32(sample.data)
            records.append((sample.number, offset, size, crc32, sample.width, sample.height, sample.label))
        end = file.tell() + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        num_bytes = end + -end % tarfile.RECORDSIZE
        file.truncate(num_bytes)
    index = io.BytesIO()
    np.save(index, np.array(records, dtype=RECORD), allow_pickle=False)
    with replacing(folder / index_name(name)) as file:
        file.write(index.getvalue())
    return Shard(name, len(records), num_bytes, hashlib.sha256(index.getvalue()).hexdigest())


def _write_member(file: BinaryIO, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its defaults: mtime 0, uid 0, gid 0, mode 644
    info.size = len(data)
    file.write(info.tobuf(format=tarfile.USTAR_FORMAT))
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


def write_manifest(folder: Path, *, classes: list[str], seed: int, shards: list[Shard]) -> None:
    """Write manifest.json, which makes the folder a finished set."""
    manifest = {
        "version": VERSION,
        "num_samples": sum(shard.num_samples for shard in shards),
        "classes": classes,
        "seed": seed,
        "shards": [asdict(shard) for shard in shards],
        "fingerprint": compute_fingerprint(classes, shards),
    }
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def compute_fingerprint(classes: list[str], shards: list[Shard]) -> str:
    """sha256 of what defines the content: through the indexes, the size and crc32 of every image and its label."""
    content = [VERSION, classes, [asdict(shard) for shard in shards]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def list_files(folder: Path) -> list[Path]:
    """The files in `folder` that have a name of this format, the manifest first."""

    def is_ours(name: str) -> bool:
        name = name.removesuffix(".tmp")
        tar_name = name.removesuffix(".index.npy") + ".tar" if name.endswith(".index.npy") else name
        return name in (MANIFEST, SOURCES, SKIPPED) or SHARD_NAME.fullmatch(tar_name) is not None

    files = [path for path in folder.iterdir() if is_ours(path.name) and not path.is_dir()]
    return sorted(files, key=lambda path: (path.name != MANIFEST, path.name))


# ---- reading


@dataclass(frozen=True)
class ShardSet:
    """A finished shard folder. Sample ids are 0 to num_samples - 1."""

    folder: Path
    classes: list[str]
    seed: int
    shards: list[Shard]
    fingerprint: str
    ends: list[int]  # ends[s]: the number of samples in shards 0 to s

    @classmethod
    def open(cls, folder: str | Path, *, label: str) -> "ShardSet":
        """Check manifest and file sizes (one directory listing, no file but the manifest is opened).

        label: what the user calls this folder, such as 'data.train'
        Raises ShardError, one line, for a folder that cannot be used.
        """
        folder = Path(folder)
        make = f"`dmae-shards make SRC {folder}`"
        try:
            text = (folder / MANIFEST).read_bytes()
            found = {entry.name: entry for entry in os.scandir(folder)}
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(
                f"{label} '{folder}' is not a shard folder: no {MANIFEST} there; make one with {make}"
            ) from None
        except OSError as error:
            raise ShardError(f"{label} '{folder}' cannot be read: {error.strerror}") from None
        try:
            classes, seed, shards, fingerprint = _parse_manifest(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{label} '{folder}': {MANIFEST} is unusable: {error}; make it again with {make}"
            ) from None
        for shard in shards:
            for name in (shard.name, index_name(shard.name)):
                if name not in found:
                    raise ShardError(f"{label} '{folder}': {name} is missing; copy it again or run {make}")
            size = found[shard.name].stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"{label} '{folder}': {shard.name} has {size:,} bytes, {MANIFEST} says {shard.bytes:,}; "
                    f"copy it again or run {make}"
                )
        ends = list(itertools.accumulate(shard.num_samples for shard in shards))
        return cls(folder, classes, seed, shards, fingerprint, ends)

    @property
    def num_samples(self) -> int:
        return self.ends[-1]

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Returns (shard number, row in its index)."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} of {self.num_samples} samples")
        shard = bisect.bisect_right(self.ends, sample_id)
        return shard, sample_id - self.ends[shard] + self.shards[shard].num_samples

    def open_index(self, shard: int) -> np.memmap:
        """The records of one shard, [num_samples] of RECORD. Holds a descriptor for as long as it lives."""
        path = self.folder / index_name(self.shards[shard].name)
        try:
            records = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the index cannot be read ({error}); copy it again") from None
        expected = (self.shards[shard].num_samples,)
        if records.dtype != RECORD or records.shape != expected:
            raise ShardError(
                f"{path}: found {records.shape} records of {records.dtype}, expected {expected} of {RECORD}; "
                f"copy it again"
            )
        return records


def _parse_manifest(text: bytes) -> tuple[list[str], int, list[Shard], str]:
    """Returns (classes, seed, shards, fingerprint). Raises ValueError that says which part is wrong."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise ValueError(what)

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0  # type(): a bool is no count

    manifest = json.loads(text)
    check(isinstance(manifest, dict), f"found a {type(manifest).__name__}, expected an object")
    version = manifest.get("version")
    check(version == VERSION, f"found format version {version!r}, expected {VERSION}")
    classes, seed, entries = manifest.get("classes"), manifest.get("seed"), manifest.get("shards")
    check(isinstance(classes, list) and all(isinstance(c, str) for c in classes), "classes is not a list of names")
    check(type(seed) is int, f"seed is {seed!r}, expected an integer")
    check(isinstance(entries, list), "shards is not a list")
    shards = []
    fields = list(Shard.__dataclass_fields__)
    for number, entry in enumerate(entries):
        check(isinstance(entry, dict) and set(entry) == set(fields), f"shard {number} has not the fields {fields}")
        shard = Shard(**entry)
        good = isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name) is not None
        check(good, f"shard {number} is named {shard.name!r}, expected shard-NNNNNN.tar")
        good = is_count(shard.num_samples) and is_count(shard.bytes)
        check(good, f"num_samples or bytes of {shard.name} is no count")
        shards.append(shard)
    found, total = manifest.get("num_samples"), sum(shard.num_samples for shard in shards)
    check(total > 0, "it lists no samples")
    check(found == total, f"num_samples is {found!r}, its shards hold {total}")
    fingerprint = compute_fingerprint(classes, shards)
    check(manifest.get("fingerprint") == fingerprint, "it does not match its own fingerprint (was it edited?)")
    return classes, seed, shards, fingerprint
