"""WebDataset tars as samples: members matched by key, the image's header and label read.

For `index` and `verify`.
"""

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
class Found:
    """One sample of a tar. `reason` says why it cannot be used."""

    key: str
    name: str = ""  # the image's member
    offset: int = 0
    size: int = 0
    crc32: int = 0
    width: int = 0
    height: int = 0
    label: int | None = None  # None: it has none
    reason: str | None = None

    def record(self, number: int) -> tuple:
        label = -1 if self.label is None else self.label
        return number, self.offset, self.size, self.crc32, self.width, self.height, label


class Labels:
    """Which member holds the label: `cls` (a number as text), or `json:KEY`.

    A pickled one is never loaded.
    """

    def __init__(self, text: str):
        self.extension, _, self.key = text.partition(":")
        if self.key and self.extension != "json":
            raise ShardError(
                f"--label '{text}' is unknown; choose a member's extension such as cls, or json:KEY"
            )

    def read(self, data: bytes) -> int:
        """Raises ValueError if it is no label."""
        value = data.strip().decode("ascii", "replace") if not self.key else _json_field(data, self.key)
        if (
            not re.fullmatch("-?[0-9]{1,7}", str(value))
            or isinstance(value, bool)
            or not -1 <= int(value) <= MAX_LABEL
        ):
            raise ValueError(f"its label is {str(value)[:40]!r}, expected a number from 0 to {MAX_LABEL:,}")
        return int(value)


def read_samples(file: BinaryIO, *, image: str | None, labels: Labels) -> Iterator[Found]:
    """The samples of a tar in order: consecutive members with one key.

    Raises ValueError where the tar is damaged.
    """
    key: str | None = None
    members: dict[str, Member] = {}
    for member in scan_tar(file):
        parts = split_key(member.name)
        if parts is None or member.name.startswith("__"):  # webdataset's own notes on a tar
            continue
        if parts[0] != key:
            if members:
                yield _make_sample(key, members, image, labels)
            key, members = parts[0], {}
        if parts[1] in members:
            raise ValueError(f"byte {member.offset}: the sample {key!r} has two members .{parts[1]}")
        wanted = parts[1] in (*IMAGES, image, labels.extension)
        members[parts[1]] = member if wanted else member._replace(data=b"")
    if members:
        yield _make_sample(key, members, image, labels)


def open_tar(base: str, name: str) -> BinaryIO:
    """A tar for reading, of a folder or a URL. Raises OSError."""
    if not REMOTE.match(base):
        return open(f"{base}/{name}", "rb", buffering=2**20)
    import fsspec

    return fsspec.open(
        f"{base}/{urllib.parse.quote(name)}" if base.startswith("http") else f"{base}/{name}", "rb"
    ).open()


def _make_sample(key: str, members: dict[str, Member], image: str | None, labels: Labels) -> Found:
    extension = next((name for name in members if name == image or (image is None and name in IMAGES)), None)
    if extension is None:
        wanted = image or ", .".join(IMAGES)
        return Found(
            key, reason=f"no member .{wanted}, but {', '.join('.' + name for name in list(members)[:5])}"
        )
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
        return Found(key, member.name, reason=str(error))
    return Found(key, member.name, member.offset, member.size, crc32(member.data), width, height, label)


def _json_field(data: bytes, key: str) -> object:
    try:
        return json.loads(data)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"its .json has no {key!r}") from None
