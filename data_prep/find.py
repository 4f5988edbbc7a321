"""Which files of SRC are images, and their labels: a listing that costs about 50 bytes a file and no Python objects.

    class folders (default)   SRC/<class>/**/<image>, classes numbered by sorted name, or by their line in --classes
    --labels FILE             SRC/**/<image>, a line `<name> <label>` for each
    --unlabelled              SRC/**/<image>, every label -1

Files whose name ends like an image's are listed whatever they are: a dangling link called x.jpg is a lost
image, not some other file. Everything else is counted by suffix. Names are bytes, and sorted as such.
"""

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dmae_ds.data.shards import ShardError

SUFFIXES = (b".jpg", b".jpeg", b".jpe", b".png")
MAX_DEPTH = 100
MAX_LABEL = 10**6  # a larger one is no label but a mistake, and the table of classes is a list


@dataclass
class Listing:
    """Images in the order of their names. Paths are relative to SRC."""

    classes: list[str] = field(default_factory=list)  # empty: unlabelled
    labels: array = field(default_factory=lambda: array("i"))
    ignored: Counter = field(default_factory=Counter)  # suffix -> files
    skipped: list[dict] = field(
        default_factory=list
    )  # what could not even be listed: {number: None, source, reason}
    _paths: bytearray = field(default_factory=bytearray)
    _ends: array = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, number: int) -> bytes:
        return bytes(self._paths[self._ends[number - 1] if number else 0 : self._ends[number]])

    def add(self, path: bytes, label: int) -> None:
        self._paths += path
        self._ends.append(len(self._paths))
        self.labels.append(label)

    def skip(self, path: bytes, reason: str) -> None:
        self.skipped.append({"number": None, "source": os.fsdecode(path), "reason": reason})

    def sha256(self) -> str:
        """Of the names, the labels and the classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self._paths, self._ends, self.labels):
            digest.update(part)
        return digest.hexdigest()


def find_images(
    src: Path, *, classes_file: Path | None = None, labels_file: Path | None = None, unlabelled: bool = False
) -> Listing:
    """The images of SRC. Raises ShardError for a folder or a list that cannot be used."""
    if not src.is_dir():
        raise ShardError(f"SRC '{src}' is not a folder")
    listing = Listing()
    names = None if classes_file is None else read_lines(classes_file, "--classes")
    if labels_file is not None:
        _find_by_list(src, listing, labels_file, names)
    elif unlabelled:
        for path in _walk(src, b"", listing, []):
            listing.add(path, -1)
    else:
        _find_by_folder(src, listing, names, classes_file)
    if not len(listing):
        where = f"its {len(listing.classes)} class folders" if listing.classes else "it"
        suffixes = ", ".join(suffix.decode() for suffix in SUFFIXES)
        raise ShardError(f"SRC '{src}' has no {suffixes} files in {where}")
    return listing


def _find_by_folder(src: Path, listing: Listing, names: list[str] | None, classes_file: Path | None) -> None:
    folders, hidden = [], 0
    for entry in _scan(src, b"", listing):
        if entry.endswith(b"/"):
            folders.append(entry[:-1])
        else:
            hidden += 1
            listing.skip(entry, "outside of the class folders")
    if not folders:
        raise ShardError(
            f"SRC '{src}' has no class folders; expected SRC/<class>/<image>, or --labels FILE or --unlabelled for a "
            f"flat folder ({hidden:,} images lie in it)"
        )
    found = [os.fsdecode(folder) for folder in folders]
    if names is None:
        listing.classes = found
    else:
        listing.classes = _match_classes(names, set(found), classes_file)
        unknown = sorted(set(found) - set(listing.classes))
        if unknown:
            raise ShardError(
                f"--classes '{classes_file}' has no line for the folder '{unknown[0]}' ({len(unknown)} such)"
            )
    label_of = {name: label for label, name in enumerate(listing.classes)}
    ancestors = [_identity(src)]
    for folder, name in zip(folders, found, strict=True):
        for path in _walk(src, folder, listing, ancestors):
            listing.add(path, label_of[name])


def _find_by_list(src: Path, listing: Listing, labels_file: Path, names: list[str] | None) -> None:
    """Flat folders: `<name> <label>` lines, name with or without suffix; a label is a class's name or its number."""
    words: dict[bytes, str] = {}
    for number, line in enumerate(read_lines(labels_file, "--labels"), start=1):
        match = re.fullmatch(r"(.*\S)[\t, ]+(\S+)", line)
        if match is None:
            raise ShardError(
                f"--labels '{labels_file}' line {number}: found {line[:80]!r}, expected `<image> <label>`"
            )
        if words.setdefault(os.fsencode(match[1].rstrip(" \t,")), match[2]) != match[2]:
            raise ShardError(f"--labels '{labels_file}' line {number}: '{match[1]}' has two labels")
    used = set(words.values())
    if names is not None:
        listing.classes = [name.split()[0] for name in names]
    elif all(re.fullmatch("[0-9]+", word) for word in used):
        largest = max(map(int, used))
        if largest > MAX_LABEL:
            raise ShardError(f"--labels '{labels_file}': the label {largest} is larger than {MAX_LABEL:,}")
        listing.classes = [str(label) for label in range(largest + 1)]
    else:
        listing.classes = sorted(used)
    label_of = {name: label for label, name in enumerate(listing.classes)}
    for word in used - set(label_of):
        if not re.fullmatch("[0-9]{1,7}", word) or int(word) >= len(listing.classes):
            raise ShardError(
                f"--labels '{labels_file}': the label '{word}' is none of the {len(listing.classes):,} classes, and no "
                f"number of one; --classes FILE names them"
            )
        label_of[word] = int(word)
    for path in _walk(src, b"", listing, []):
        word = words.get(path) or words.get(os.path.splitext(path)[0])
        if word is None:
            listing.skip(path, f"no label in {labels_file.name}")
        else:
            listing.add(path, label_of[word])


def _match_classes(names: list[str], folders: set[str], classes_file: Path | None) -> list[str]:
    """A line is a folder's name, or begins with it (`n01440764 tench, Tinca tinca`)."""
    classes = [name if name in folders else name.split()[0] for name in names]
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice:
        raise ShardError(f"--classes '{classes_file}' names '{twice[0]}' twice")
    return classes


def read_lines(path: Path, option: str) -> list[str]:
    try:
        lines = os.fsdecode(path.read_bytes()).split("\n")
    except OSError as error:
        raise ShardError(f"{option} '{path}' cannot be read: {error.strerror}") from None
    lines = [line.strip() for line in lines]
    lines = [line for line in lines if line]
    if not lines:
        raise ShardError(f"{option} '{path}' is empty")
    return lines


def _walk(src: Path, folder: bytes, listing: Listing, ancestors: list[tuple[int, int]]) -> Iterator[bytes]:
    """Image files below src/folder, folders in folders too, sorted.

    A link to a folder that it lies in is a loop.
    """
    try:
        identity = _identity(src, folder)
        if identity in ancestors:
            listing.skip(folder, "a link to a folder that it lies in")
            return
        if len(ancestors) > MAX_DEPTH:
            listing.skip(folder, f"more than {MAX_DEPTH} folders deep")
            return
        entries = _scan(src, folder, listing)
    except OSError as error:
        listing.skip(folder, f"the folder cannot be read: {error.strerror}")
        return
    for entry in entries:
        path = folder + b"/" + entry if folder else entry
        if entry.endswith(b"/"):
            yield from _walk(src, path[:-1], listing, [*ancestors, identity])
        else:
            yield path


def _scan(src: Path, folder: bytes, listing: Listing) -> list[bytes]:
    """Sorted names of images and, with a slash behind them, folders; everything else is counted."""
    names = []
    with os.scandir(os.path.join(os.fsencode(src), folder)) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                listing.ignored["hidden"] += 1
            elif name.lower().endswith(SUFFIXES) and not _is_folder(entry):
                names.append(name)
            elif _is_folder(entry):
                names.append(name + b"/")
            else:
                listing.ignored[os.fsdecode(os.path.splitext(name)[1].lower()) or "no suffix"] += 1
    names.sort()
    return names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(src: Path, folder: bytes = b"") -> tuple[int, int]:
    status = os.stat(os.path.join(os.fsencode(src), folder))
    return status.st_dev, status.st_ino
