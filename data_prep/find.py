"""Find the images of SRC and their labels, in a listing of about 50 bytes a file without Python objects.

    class folders (default)   SRC/<class>/**/<image>, classes numbered by name, or by line in --classes
    --labels FILE             SRC/**/<image>, a line `<name> <label>` for each
    --unlabelled              SRC/**/<image>, every label -1

Files whose name ends like an image's are listed whatever they are: a dangling link named x.jpg is a lost
image, not another file. Everything else is counted by suffix, folders of the system by name. Names are bytes,
and sorted as such.
"""

import difflib
import hashlib
import os
import random
import shlex
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.class_list import plain_path, read_classes, read_rows, unquote
from data_prep.folders import ClassFolder, check_classes, check_level, is_system_folder
from data_prep.label_list import match_labels
from dmae_ds.data.shards import ShardError

SUFFIXES = (b".jpg", b".jpeg", b".jpe", b".png")
ARRAYS = (b".npy",)  # with --arrays
MAX_DEPTH = 100
HELD_OUT_SHARE, MAX_HELD_OUT = 10, 1000  # of `part`: a tenth of the images, at most 1,000
READ = "JPEG and PNG are read, as 8-bit RGB (more channels or bits: .npy arrays, with --arrays)"
CONVERTED = (".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2", ".ppm", ".pgm")  # what PIL opens, too


@dataclass
class Listing:
    """Images in the order of their names; paths are relative to SRC."""

    classes: list[str] = field(default_factory=list)  # empty: unlabelled
    labels: array = field(default_factory=lambda: array("i"))
    ignored: Counter = field(default_factory=Counter)  # suffix -> files
    # files that could not be listed: {number: None, source, reason}
    skipped: list[dict] = field(default_factory=list)
    suffixes: tuple[bytes, ...] = SUFFIXES  # of the files that are listed
    notes: list[str] = field(default_factory=list)  # for the user: what was left out of a list
    has_links: bool = False  # whether a file or folder is a link
    _paths: bytearray = field(default_factory=bytearray)
    _ends: array = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, number: int) -> bytes:
        """Path of an image."""
        return bytes(self._paths[self._ends[number - 1] if number else 0 : self._ends[number]])

    def add(self, path: bytes, label: int) -> None:
        """Add an image."""
        self._paths += path
        self._ends.append(len(self._paths))
        self.labels.append(label)

    def skip(self, path: bytes, reason: str) -> None:
        """Add a file that cannot be used."""
        self.skipped.append({"number": None, "source": os.fsdecode(path), "reason": reason})

    def part(self, name: str, seed: int, src: Path) -> "Listing":
        """The held-out images (`val`) or the others (`train`); the draw depends on number and seed alone.

        Where there are links, all names of one file are in one part.
        Raises ShardError where there are fewer than two images.
        """
        if len(self) < 2:
            raise ShardError(f"{len(self)} image cannot be divided into two parts; leave --part out")
        num_held_out = min(max(len(self) // HELD_OUT_SHARE, 1), MAX_HELD_OUT)
        held_out = set(random.Random(seed).sample(range(len(self)), num_held_out))
        chosen = Listing(self.classes, ignored=self.ignored, skipped=self.skipped, notes=self.notes)
        first_of = self._first_names(src) if self.has_links else range(len(self))
        held_out = {first_of[number] for number in held_out}
        for number, label in enumerate(self.labels):
            if (first_of[number] in held_out) == (name == "val"):
                chosen.add(self.path(number), label)
        if not len(chosen):
            raise ShardError(f"all {len(self)} images are one file; leave --part out")
        return chosen

    def _first_names(self, src: Path) -> list[int]:
        """For each image the number of the first that is the same file."""
        seen: dict[tuple[int, int], int] = {}
        numbers = []
        for number in range(len(self)):
            try:
                numbers.append(seen.setdefault(_identity(src, self.path(number)), number))
            except OSError:  # a dangling link
                numbers.append(number)
        return numbers

    def only(self, file: Path) -> "Listing":
        """The images that a list names, a line each: by path, base name, or either without suffix.

        Raises ShardError for a line that names no image or several.
        """
        numbers: dict[str, set[int]] = {}
        for number in range(len(self)):
            text = os.fsdecode(self.path(number))
            base = text.rpartition("/")[2]
            for name in {text, os.path.splitext(text)[0], base, os.path.splitext(base)[0]}:
                numbers.setdefault(name, set()).add(number)
        chosen: set[int] = set()
        for row in read_rows(file, "--only"):
            same = numbers.get(plain_path(unquote(row.text)), set())
            if len(same) != 1:
                found = f"names {len(same)} images" if same else "names no image of SRC"
                raise ShardError(
                    f"--only '{file}' line {row.number} {found}: {row.text[:80]!r}; expected one path or "
                    f"base name, with or without suffix"
                )
            chosen |= same
        listing = Listing(self.classes, ignored=self.ignored, skipped=self.skipped, notes=self.notes)
        listing.has_links = self.has_links
        for number in sorted(chosen):
            listing.add(self.path(number), self.labels[number])
        listing.notes.append(f"{len(listing):,} of {len(self):,} images are in --only {file.name}")
        return listing

    def sha256(self) -> str:
        """sha256 of the names, the labels and the classes."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for column in (self._paths, self._ends, self.labels):
            digest.update(column)
        return digest.hexdigest()


def find_images(
    src: Path,
    *,
    classes_file: Path | None = None,
    labels_file: Path | None = None,
    unlabelled: bool = False,
    arrays: bool = False,
) -> Listing:
    """Find the images of SRC, or with `arrays` its .npy files.

    Raises ShardError for a folder or a list that cannot be used.
    """
    if not src.is_dir():
        raise ShardError(f"SRC '{src}' is not a folder")
    listing = Listing(suffixes=ARRAYS if arrays else SUFFIXES)
    if labels_file is not None:
        _find_by_list(src, listing, labels_file, classes_file)
    elif unlabelled:
        for path in walk_images(src, b"", listing, []):
            listing.add(path, -1)
    else:
        _find_by_folder(src, listing, classes_file)
    if not len(listing):
        where = f"its {len(listing.classes)} class folders" if listing.classes else "it"
        suffixes = ", ".join(suffix.decode() for suffix in listing.suffixes)
        others = ", ".join(f"{number:,} {kind}" for kind, number in listing.ignored.most_common(3))
        others = f" (but {others})" if others else ""
        raise ShardError(
            f"SRC '{src}' has no {suffixes} files in {where}{others}; {READ}{how_to_convert(src, listing)}"
        )
    if not arrays and how_to_convert(src, listing):
        listing.notes.append(f"left out: {READ}{how_to_convert(src, listing)}")
    if listing.classes:
        listing.notes += check_classes(listing.classes, set(listing.labels))
    return listing


def how_to_convert(src: Path, listing: Listing) -> str:
    """The line that converts the images of another kind that lie in SRC; empty where there are none."""
    kind, number = max(
        ((suffix, listing.ignored[suffix]) for suffix in CONVERTED), key=lambda item: item[1], default=("", 0)
    )
    if not number:
        return ""
    # To x.tif.png, which overwrites no x.png.
    program = (
        "import sys; from pathlib import Path; from PIL import Image; "
        "from dmae_ds.data.pixels import to_rgb; "
        "[to_rgb(Image.open(p)).save(f'{p}.png') for p in Path(sys.argv[1]).rglob('*') "
        f"if p.suffix.lower() == '{kind}']"
    )
    return f'; {number:,} {kind} files lie there; convert them: python -c "{program}" {shlex.quote(str(src))}'


def _find_by_folder(src: Path, listing: Listing, classes_file: Path | None) -> None:
    """Add the images of class folders."""
    folders, num_outside = [], 0
    for entry in _scan(src, b"", listing):
        if entry.endswith(b"/"):
            folders.append(entry[:-1])
        else:
            num_outside += 1
            listing.skip(entry, "outside of the class folders")
    if not folders:
        raise ShardError(
            f"SRC '{src}' has no class folders; expected SRC/<class>/<image>, or --labels FILE or "
            f"--unlabelled for a flat folder (it has {num_outside:,} images)"
        )
    folder_names = [os.fsdecode(folder) for folder in folders]
    if classes_file is None:
        listing.classes = folder_names
    else:
        listing.classes = read_classes(classes_file, folder_names, listing.notes)
        unknown = sorted(set(folder_names) - set(listing.classes))
        if unknown:
            near = difflib.get_close_matches(unknown[0], listing.classes, 1)
            raise ShardError(
                f"--classes '{classes_file}' has no line for the folder '{unknown[0]}' ({len(unknown)} such)"
                f"{f', but one for {near[0]!r}' if near else ''}; add a line, or remove the folder"
            )
    label_of = {name: label for label, name in enumerate(listing.classes)}
    ancestors = [_identity(src)]
    walked = []
    for folder, name in zip(folders, folder_names, strict=True):
        walked.append(ClassFolder(name))
        for path in walk_images(src, folder, listing, ancestors):
            listing.add(path, label_of[name])
            walked[-1].add(path)
    if classes_file is None:
        listing.notes += check_level(src, walked)


def _find_by_list(src: Path, listing: Listing, labels_file: Path, classes_file: Path | None) -> None:
    """Add the images of a flat folder, by `<name> <label>` lines (`data_prep/label_list.py`)."""
    paths = list(walk_images(src, b"", listing, []))
    if not paths:
        return
    matched = match_labels(labels_file, paths, src, classes_file)
    listing.classes = matched.classes
    listing.notes += matched.notes
    for number, path in enumerate(paths):
        label = matched.labels.get(number)
        if label is None:
            listing.skip(path, matched.reason(os.fsdecode(path), labels_file.name))
        else:
            listing.add(path, label)


def walk_images(
    src: Path, folder: bytes, listing: Listing, ancestors: list[tuple[int, int]]
) -> Iterator[bytes]:
    """Files of the listing's suffixes below src/folder, sorted; a link to a folder around it is a loop."""
    try:
        identity = _identity(src, folder)
        if identity in ancestors:
            listing.skip(folder, "a link to a folder that contains it")
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
            yield from walk_images(src, path[:-1], listing, [*ancestors, identity])
        else:
            yield path


def _scan(src: Path, folder: bytes, listing: Listing) -> list[bytes]:
    """Sorted names of images and, with a slash at the end, folders; everything else is counted.

    A file next to which lies what it was converted to, x.tif.png, is counted as such.
    """
    names, others = [], []
    with os.scandir(os.path.join(os.fsencode(src), folder)) as entries:
        for entry in entries:
            name = entry.name
            listing.has_links |= entry.is_symlink()
            if is_system_folder(name) and _is_folder(entry):
                listing.ignored[f"folder {os.fsdecode(name)}"] += 1
            elif name.startswith(b"."):
                listing.ignored["hidden"] += 1
            elif name.lower().endswith(listing.suffixes) and not _is_folder(entry):
                names.append(name)
            elif _is_folder(entry):
                names.append(name + b"/")
            elif entry.is_symlink() and not os.path.splitext(name)[1] and not os.path.exists(entry.path):
                listing.skip(os.path.join(folder, name), "a link to nothing, maybe to a folder")
            else:
                others.append(name)
    known = set(names)
    for name in others:
        kind = os.fsdecode(os.path.splitext(name)[1].lower()) or "no suffix"
        listing.ignored[f"{kind} with a .png" if name + b".png" in known else kind] += 1
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
