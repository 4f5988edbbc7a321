"""Read the samples of WebDataset tars for `index` and `verify`: members by key, header and label."""

import json
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.header import read_header
from data_prep.scan import MAX_BYTES, Member, scan_tar, split_key
from dmae_ds.data.shards import ShardError, crc32

IMAGES = ("jpg", "jpeg", "png")
REMOTE = re.compile("(https?|s3|gs|hf)://")
MAX_LABEL = 10**6


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar."""

    key: str
    name: str = ""  # member that is the image
    offset: int = 0
    size: int = 0
    crc32: int = 0
    width: int = 0
    height: int = 0
    label: int | None = None  # None: no label
    reason: str | None = None  # why the sample cannot be used

    def record(self, number: int) -> tuple:
        """Fields of the sample's RECORD."""
        label = -1 if self.label is None else self.label
        return number, self.offset, self.size, self.crc32, self.width, self.height, label


class Labels:
    """Reader of labels from the member `cls` (a number as text) or `json:KEY`; pickles are never loaded."""

    def __init__(self, text: str):
        self.extension, _, self.key = text.partition(":")
        if self.key and self.extension != "json":
            raise ShardError(
                f"--label '{text}' is unknown; choose a member's extension such as cls, or json:KEY"
            )

    def read(self, data: bytes) -> int:
        """Label in the bytes of a member. Raises ValueError."""
        value = data.strip().decode("ascii", "replace") if not self.key else _json_field(data, self.key)
        is_number = not isinstance(value, bool) and re.fullmatch("-?[0-9]{1,7}", str(value))
        if not is_number or not -1 <= int(value) <= MAX_LABEL:
            raise ValueError(f"its label is {str(value)[:40]!r}, expected a number from 0 to {MAX_LABEL:,}")
        return int(value)


def read_samples(file: BinaryIO, *, image: str | None, labels: Labels) -> Iterator[TarSample]:
    """Yield the samples of a tar: consecutive members with one key. Raises ValueError if it is damaged."""
    key: str | None = None
    members: dict[str, Member] = {}
    for member in scan_tar(file):
        split = split_key(member.name)
        if split is None or member.name.startswith("__"):  # webdataset's notes on a tar
            continue
        member_key, extension = split
        if member_key != key:
            if members:
                yield _make_sample(key, members, image, labels)
            key, members = member_key, {}
        if extension in members:
            raise ValueError(f"byte {member.offset}: the sample {key!r} has two members .{extension}")
        is_used = extension in (*IMAGES, image, labels.extension)
        members[extension] = member if is_used else member._replace(data=b"")
    if members:
        yield _make_sample(key, members, image, labels)


def open_tar(base: str, name: str) -> BinaryIO:
    """Open a tar of a folder or a URL for reading. Raises OSError."""
    if not REMOTE.match(base):
        return open(f"{base}/{name}", "rb", buffering=2**20)
    import fsspec

    name = urllib.parse.quote(name) if base.startswith("http") else name
    return fsspec.open(f"{base}/{name}", "rb").open()


def _make_sample(key: str, members: dict[str, Member], image: str | None, labels: Labels) -> TarSample:
    """The sample of some members; with a reason if it cannot be used."""
    extensions = IMAGES if image is None else (image,)
    extension = next((name for name in members if name in extensions), None)
    if extension is None:
        expected = ", ".join(f".{name}" for name in extensions)
        others = ", ".join(f".{name}" for name in list(members)[:5])
        return TarSample(key, reason=f"no member {expected}, but {others}")
    member = members[extension]
    try:
        if member.data is None:
            raise ValueError(f"{member.size:,} bytes are more than {MAX_BYTES:,}")
        if not member.size:
            raise ValueError("empty")
        _, width, height = read_header(member.data, member.size)
        labelled = members.get(labels.extension)
        label = None if labelled is None or labelled.data is None else labels.read(labelled.data)
    except ValueError as error:
        return TarSample(key, member.name, reason=str(error))
    checksum = crc32(member.data)
    return TarSample(key, member.name, member.offset, member.size, checksum, width, height, label)


def _json_field(data: bytes, key: str) -> object:
    """Value of a key in a .json member. Raises ValueError."""
    try:
        return json.loads(data)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"its .json has no {key!r}") from None
