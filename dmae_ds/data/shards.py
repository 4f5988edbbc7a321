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

import hashlib
import io
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
