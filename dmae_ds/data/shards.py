"""Shard folder on disk: plain WebDataset tars, each with an index for reading a sample by one `pread`.

    shard-000000.tar         ustar: 000000000.jpg (or .png), .cls and optionally .json, 000000001.jpg, ...
                             (of a dense set also .seg.png, .ann.json: dense_members.py)
    shard-000000.index.npy   one RECORD a sample, in the order of the tar
    sources.txt              line k + 1: the source file of key k, as a JSON string
    skipped.jsonl            the files that were left out, with reasons; exists only if there are any
    manifest.json            written last: a folder without it is unfinished
    journal.jsonl            options and finished shards; exists only while the folder is unfinished

A key is the 9-digit number of the sample. Numbers increase but may have gaps (skipped files), so training
counts in
sample ids: 0 to num_samples - 1, shards and rows in order. Any WebDataset reader can use the tars without the
rest. `dmae-shards make SRC DST` writes such a folder, `dmae-shards index TARS` one for existing tars: there
the index is named after the tar, a line of sources.txt is the tar's name and the member's, and `base` in the
manifest is the folder of the tars if they are elsewhere. Without torch: the shard tool imports this module.
"""

import hashlib
import io
import json
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal.isal_zlib import crc32  # 7 to 14 times as fast as zlib's (measured), which would cost half the time

from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing

VERSION = 2
MANIFEST, SOURCES, SKIPPED = "manifest.json", "sources.txt", "skipped.jsonl"
# exists while a conversion of COCO's files runs: a line for each line of sources.txt
ANNOTATIONS = "annotations.jsonl.tmp"
JOURNAL = "journal.jsonl"  # exists while a conversion is unfinished
SHARD_NAME = re.compile(r"shard-[0-9]{6}\.tar")
ANY_TAR_NAME = re.compile(r"[^./\\:][^/\\:]*\.tar")
RECORD = np.dtype(
    [
        ("number", "<u8"),  # the key
        ("offset", "<u8"),  # of the image's first byte in the tar
        ("size", "<u4"),  # of the image in bytes
        ("crc32", "<u4"),  # of the image's bytes
        ("width", "<u4"),
        ("height", "<u4"),
        ("label", "<i4"),
    ]
)
# Of a dense set: after the image's fields those of its members; size 0: the sample does not have the member.
DENSE_RECORD = np.dtype(
    [
        *RECORD.descr,
        ("seg_offset", "<u8"),
        ("ann_offset", "<u8"),
        ("seg_size", "<u4"),
        ("ann_size", "<u4"),
        ("seg_crc32", "<u4"),
        ("ann_crc32", "<u4"),
    ]
)
DENSE_MEMBERS = {"seg": "seg.png", "ann": "ann.json"}  # prefix of the fields -> extension
# (buffer, offset) -> the fields of one RECORD, in a third of numpy's time
UNPACK_RECORD = struct.Struct("<QQIIIIi").unpack_from


# first bytes of files that are found under the name of a tar
FORMATS = {
    b"\x1f\x8b": "compressed by gzip; unpack it with gunzip -c",
    b"BZh": "compressed by bzip2; unpack it with bunzip2 -c",
    b"\xfd7zXZ": "compressed by xz; unpack it with xz -dc",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with zstd -dc",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it with lz4 -dc",
    b"PK\x03\x04": "a zip archive; pack its files into a tar",
    b"Rar!": "a rar archive; pack its files into a tar",
    b"7z\xbc\xaf": "a 7z archive; pack its files into a tar",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file with git lfs pull",
    b"<": "a web page, probably an error of the server; download it again",
    b"\xff\xd8\xff": "a JPEG image; pack images into a tar",
}


def name_format(start: bytes) -> str | None:
    """What a file is that should be a tar, and what to do; None: unknown."""
    return next((text for magic, text in FORMATS.items() if start.startswith(magic)), None)


class ShardError(UserError):
    """A shard folder, a shard or a sample that cannot be used; the message has place, finding and remedy."""


@dataclass(frozen=True)
class Shard:
    """One shard, as listed in the manifest."""

    name: str
    num_samples: int
    bytes: int
    index_sha256: str


class NewSample(NamedTuple):
    """One sample that is to be written into a shard."""

    number: int
    extension: str  # jpg or png
    data: bytes | memoryview  # read before the next sample is requested, so its buffer may be reused
    width: int
    height: int
    label: int
    json: bytes | None = None
    seg: bytes | None = None  # label map; written into dense sets alone, as is ann
    ann: bytes | None = None  # boxes, classes and masks


def index_name(shard_name: str) -> str:
    """File name of a shard's index."""
    return shard_name.removesuffix(".tar") + ".index.npy"


def is_shard_name(name: object) -> bool:
    """Whether a tar may have this name: a plain file name NAME.tar, not a path, not hidden, and printable."""
    return (
        isinstance(name, str)
        and len(name) <= 200
        and ANY_TAR_NAME.fullmatch(name) is not None
        and name.isprintable()
    )


def write_shard(folder: Path, name: str, samples: Iterable[NewSample], *, dense: bool = False) -> Shard:
    """Write one tar and its index; equal samples give equal bytes."""
    shard, commit = draft_shard(folder, name, samples, dense=dense)
    commit()
    return shard


def draft_shard(
    folder: Path, name: str, samples: Iterable[NewSample], *, dense: bool = False
) -> tuple[Shard, Callable[[], None]]:
    """Write one tar under a temporary name, and return (shard, commit).

    dense: whether label maps and annotations are written, and DENSE_RECORDs

    commit() waits for the disk, writes the index and renames the tar: a thread can do so while the next shard
    is written.
    """
    records = []
    temporary = folder / (name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        position = 0
        for number, extension, data, width, height, label, meta, *members in samples:
            key, size = b"%09d" % number, len(data)
            record = (number, position + tarfile.BLOCKSIZE, size, crc32(data), width, height, label)
            header = ustar_header(b"%s.%s" % (key, extension.encode()), size)
            tail = PADDING[-size % tarfile.BLOCKSIZE] + _member(key + b".cls", b"%d" % label)
            if meta is not None:
                tail += _member(key + b".json", meta)
            if dense:
                start = position + tarfile.BLOCKSIZE + size + len(tail)
                added, fields = _dense_members(key, members, start)
                tail, record = tail + added, record + fields
            records.append(record)
            position += _write_all(descriptor, header, data, tail)
        end = position + 2 * tarfile.BLOCKSIZE  # two empty blocks end a tar
        num_bytes = end + -end % tarfile.RECORDSIZE
        os.ftruncate(descriptor, num_bytes)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    index = encode_index(np.array(records, dtype=DENSE_RECORD if dense else RECORD))

    def commit() -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with replacing(folder / index_name(name)) as file:
            file.write(index)
        os.replace(temporary, folder / name)

    return Shard(name, len(records), num_bytes, hashlib.sha256(index).hexdigest()), commit


def _dense_members(key: bytes, members: list[bytes | None], start: int) -> tuple[bytes, tuple[int, ...]]:
    """The members of a dense sample as bytes of the tar, from `start`, and their fields of DENSE_RECORD."""
    text, fields = b"", []
    for extension, data in zip(DENSE_MEMBERS.values(), members, strict=True):
        if data is None:
            fields.append((0, 0, 0))
            continue
        fields.append((start + len(text) + tarfile.BLOCKSIZE, len(data), crc32(data)))
        text += _member(b"%b.%b" % (key, extension.encode()), data)
    return text, tuple(value for column in zip(*fields, strict=True) for value in column)


def encode_index(records: np.ndarray) -> bytes:
    """Bytes of an index file: a plain .npy of RECORD or DENSE_RECORD."""
    file = io.BytesIO()
    np.save(file, records, allow_pickle=False)
    return file.getvalue()


# Fields of a ustar header: mode, uid, gid | size | mtime 0 | checksum | type, link, magic, owner, device,
# prefix.
_MODE, _MTIME = b"0000644\0" + b"0000000\0" * 2, b"\0" + b"0" * 11 + b"\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
PADDING = [bytes(number) for number in range(tarfile.BLOCKSIZE)]
_CHECKSUM = sum(_MODE + _MTIME + b" " * 8 + _REST)  # the checksum counts itself as blanks


def ustar_header(name: bytes, size: int) -> bytes:
    """Header of a regular file, as tarfile.TarInfo writes it (mode 644), in a tenth of the time."""
    digits = b"%011o" % size
    checksum = _CHECKSUM + sum(name) + sum(digits)
    return b"%b%b%b%b%b%06o\0 %b" % (name, PADDING[100 - len(name)], _MODE, digits, _MTIME, checksum, _REST)


def _member(name: bytes, data: bytes) -> bytes:
    return b"%b%b%b" % (ustar_header(name, len(data)), data, PADDING[-len(data) % tarfile.BLOCKSIZE])


def _write_all(descriptor: int, *buffers: bytes | memoryview) -> int:
    """Write at once, and again only if the kernel wrote less (a nearly full disk, more than 2 GiB)."""
    written = os.writev(descriptor, buffers)
    total = sum(map(len, buffers))
    if written < total:
        rest = memoryview(b"".join(buffers))
        while written < total:
            written += os.write(descriptor, rest[written:])
    return total


def write_manifest(
    folder: Path,
    *,
    classes: list[str],
    seed: int | None,
    shards: list[Shard],
    images: str = "original",
    base: str | None = None,
    made: dict | None = None,
    dense: dict | None = None,
) -> None:
    """Write manifest.json, which makes the folder a finished set.

    dense: fields of dense_members.DenseInfo, where samples have label maps or annotations
    base: absolute path or URL of the tars, if they are not in `folder`
    made: options and checksums of the lists, for `dmae-shards` to compare; readers do not need them
    """
    manifest = {
        "version": VERSION,
        "num_samples": sum(shard.num_samples for shard in shards),
        "classes": classes,
        "seed": seed,
        "images": images,
        "base": base,
        "made": made,
        **({} if dense is None else {"dense": dense}),
        "shards": [asdict(shard) for shard in shards],
        "fingerprint": compute_fingerprint(classes, shards, dense),
    }
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def write_skipped(folder: Path, skipped: list[dict]) -> None:
    """Write skipped.jsonl, one line for each file that was left out, or remove it if there are none."""
    if not skipped:
        (folder / SKIPPED).unlink(missing_ok=True)
        return
    with replacing(folder / SKIPPED) as file:
        file.writelines(json.dumps(item).encode() + b"\n" for item in skipped)


def compute_fingerprint(classes: list[str], shards: list[Shard], dense: dict | None = None) -> str:
    """sha256 of the content: classes and, through the indexes, size, crc32 and label of every image."""
    content: list = [VERSION, classes, [vars(shard) for shard in shards]]  # asdict: seconds for 10,000 shards
    if dense is not None:
        content.append(dense)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_file_of_set(name: str) -> bool:
    """Whether a file name is one of this format, or of such a file that is being written."""
    name = name.removesuffix(".tmp")
    tar_name = name.removesuffix(".index.npy") + ".tar" if name.endswith(".index.npy") else name
    known = (MANIFEST, SOURCES, SKIPPED, JOURNAL, ANNOTATIONS.removesuffix(".tmp"))
    return name in known or SHARD_NAME.fullmatch(tar_name) is not None


def list_files(folder: Path) -> list[Path]:
    """List the files in `folder` that have a name of this format, the manifest first."""
    files = [path for path in folder.iterdir() if is_file_of_set(path.name) and not path.is_dir()]
    return sorted(files, key=lambda path: (path.name != MANIFEST, path.name))
