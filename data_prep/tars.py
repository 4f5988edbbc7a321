"""Read the samples of WebDataset tars for `index` and `verify`: members by key, links, header and label."""

import dataclasses
import json
import posixpath
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.header import read_header
from data_prep.members import DenseMembers, MemberFacts
from data_prep.scan import MAX_BYTES, Member, scan_tar, split_key
from data_prep.workers import check_parent
from dmae_ds.data.shards import DENSE_MEMBERS, ShardError, crc32

IMAGES = ("jpg", "jpeg", "png")
REMOTE = re.compile("(https?|s3|gs|hf)://")
MAX_LABEL = 10**6
MAX_LINKS = 40  # from link to link


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
    dense: tuple[int, ...] = ()  # of a dense set: the fields of DENSE_RECORD that RECORD does not have
    num_objects: int = 0
    num_masks: int = 0  # of the objects

    def record(self, number: int) -> tuple:
        """Fields of the sample's RECORD, or DENSE_RECORD."""
        label = -1 if self.label is None else self.label
        return number, self.offset, self.size, self.crc32, self.width, self.height, label, *self.dense


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


class TarReader:
    """Samples of one tar from its members, by the names in the tar alone.

    A sample is what webdataset takes for one: consecutive members with one key. In addition, links are
    followed to other members of the tar, and members of a key that stand apart are joined.
    """

    def __init__(self, *, image: str | None, labels: Labels, dense: DenseMembers | None = None):
        self.images, self.labels, self.dense = IMAGES if image is None else (image,), labels, dense
        self._members = [] if dense is None else dense.extensions
        self._used = {*self.images, labels.extension, *self._members}
        self._groups: list[_Group] = []
        self._by_name: dict[str, _Part] = {}

    def add(self, member: Member) -> None:
        """Add the next member. Raises ValueError if its sample has another with its extension."""
        split = split_key(member.name)
        if split is None or member.name.startswith("__"):  # webdataset's notes on a tar
            return
        key, extension = split
        last = self._groups[-1] if self._groups else None
        if last is None or (last.key, last.archive) != (key, member.archive):
            self._groups.append(_Group(key, member.archive, {}))
        parts = self._groups[-1].parts
        if extension in parts:
            raise ValueError(f"byte {member.offset}: the sample {key!r} has two members .{extension}")
        part = parts[extension] = self._read(member, extension)
        if extension in self._used:
            self._by_name[posixpath.normpath(member.name)] = part

    def samples(self) -> Iterator[TarSample]:
        """Samples in the order of the tar, after its last member."""
        for group in self._join():
            yield self._make_sample(group)

    def _read(self, member: Member, extension: str) -> "_Part":
        """Facts of a member; its bytes are not kept."""
        part = _Part(member.name, member.offset, member.size)
        if member.kind != "file":
            part.link, part.reason = member.target or None, f"{member.name!r} is a {member.kind}"
            if member.target:
                part.reason += f" to {member.target!r}, which is not an image or label in this tar"
                folder = posixpath.dirname(member.name) if member.kind == "symbolic link" else ""
                part.link = posixpath.normpath(posixpath.join(folder, member.target))
            return part
        if extension not in self._used:
            return part
        try:
            if member.data is None:
                raise ValueError(f"{member.size:,} bytes are more than {MAX_BYTES:,}")
            if extension == self.labels.extension and extension not in self.images:
                part.label = self.labels.read(member.data)
            elif not member.size:
                raise ValueError("empty" if extension in self.images else f"its .{extension} is empty")
            elif extension in self._members:
                part.facts, part.crc32 = self.dense.read(extension, member.data), crc32(member.data)
            else:
                _, part.width, part.height = read_header(member.data, member.size)
                part.crc32 = crc32(member.data)
        except ValueError as error:
            part.reason = str(error)
        return part

    def _follow(self, part: "_Part") -> "_Part":
        """The member behind links; a part with a reason where there is none in the tar."""
        target = part
        for _ in range(MAX_LINKS):
            if target.link is None:
                return target
            target = self._by_name.get(target.link)
            if target is None:
                return part
        return part

    def _join(self) -> list["_Group"]:
        """The groups, with those of one key joined where only one of them has an image."""
        joined: list[_Group] = []
        by_key: dict[tuple[str, int], _Group] = {}
        for group in self._groups:
            other = by_key.get((group.key, group.archive))
            if (
                other is None
                or other.parts.keys() & group.parts.keys()
                or self._both_have_images(other, group)
            ):
                joined.append(group)
                by_key[group.key, group.archive] = group
            else:
                other.parts.update(group.parts)
        return joined

    def _both_have_images(self, *groups: "_Group") -> bool:
        return all(any(extension in group.parts for extension in self.images) for group in groups)

    def _make_sample(self, group: "_Group") -> TarSample:
        """The sample of some members; with a reason if it cannot be used."""
        extension = next((name for name in group.parts if name in self.images), None)
        if extension is None:
            return TarSample(group.key, reason=self._no_image(group))
        part = self._follow(group.parts[extension])
        labelled = group.parts.get(self.labels.extension)
        labelled = None if labelled is None else self._follow(labelled)
        reason = part.reason or (None if labelled is None else labelled.reason)
        name = group.parts[extension].name
        if reason is not None:
            return TarSample(group.key, name, reason=reason)
        label = None if labelled is None else labelled.label
        sample = TarSample(
            group.key, name, part.offset, part.size, part.crc32, part.width, part.height, label
        )
        return sample if self.dense is None else self._add_members(sample, group)

    def _add_members(self, sample: TarSample, group: "_Group") -> TarSample:
        """The sample with its map and annotations; with a reason where they cannot be used."""
        fields, num_objects, num_masks = {}, 0, 0
        for extension in self._members:
            part = group.parts.get(extension)
            part = None if part is None else self._follow(part)
            reason = f"it has no .{extension}" if part is None else part.reason
            if reason is None:
                try:
                    self.dense.check(part.facts, width=sample.width, height=sample.height)
                except ValueError as error:
                    reason = str(error)
            if reason is not None:
                return TarSample(sample.key, sample.name, reason=reason)
            fields[extension] = part.offset, part.size, part.crc32
            num_objects += part.facts.num_objects
            num_masks += part.facts.num_masks
        columns = zip(*(fields.get(it, (0, 0, 0)) for it in DENSE_MEMBERS.values()), strict=True)
        dense = tuple(value for column in columns for value in column)
        return dataclasses.replace(sample, dense=dense, num_objects=num_objects, num_masks=num_masks)

    def _no_image(self, group: "_Group") -> str:
        """Why a sample has no image, and what to do if its name has a dot."""
        expected = ", ".join(f".{name}" for name in self.images)
        others = ", ".join(f".{name}" for name in list(group.parts)[:5])
        reason = f"no member {expected}, but {others}"
        dotted = next((name for name in group.parts if name.rpartition(".")[2] in IMAGES), None)
        if dotted is not None:
            reason += f" (a key ends at the first dot of a name; --image {dotted} reads this member)"
        return reason


@dataclass(slots=True)
class _Part:
    """One member, without its bytes."""

    name: str
    offset: int
    size: int
    crc32: int = 0
    width: int = 0
    height: int = 0
    label: int | None = None
    reason: str | None = None  # why it cannot be used
    link: str | None = None  # name in the tar that a link means
    facts: MemberFacts | None = None  # of a map or annotations


@dataclass(slots=True)
class _Group:
    """Consecutive members of one key, by extension."""

    key: str
    archive: int
    parts: dict[str, _Part]


def read_samples(
    file: BinaryIO, *, image: str | None, labels: Labels, dense: DenseMembers | None = None
) -> Iterator[TarSample]:
    """Yield the samples of a tar after reading all of it. Raises ValueError if it is damaged."""
    reader = TarReader(image=image, labels=labels, dense=dense)
    for member in scan_tar(file):
        check_parent()
        reader.add(member)
    yield from reader.samples()


def open_tar(base: str, name: str) -> BinaryIO:
    """Open a tar of a folder or a URL for reading. Raises OSError."""
    if not REMOTE.match(base):
        return open(f"{base}/{name}", "rb", buffering=2**20)
    import fsspec

    name = urllib.parse.quote(name) if base.startswith("http") else name
    return fsspec.open(f"{base}/{name}", "rb").open()


def _json_field(data: bytes, key: str) -> object:
    """Value of a key in a .json member. Raises ValueError."""
    try:
        return json.loads(data)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"its .json has no {key!r}") from None
