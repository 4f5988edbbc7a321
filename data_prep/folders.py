"""What class folders should look like: folders of the system, SRC one level too high, equal names."""

import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from dmae_ds.data.shards import ShardError

# left by macOS, Windows, Linux, NAS devices, Android and tools, in lower case
SYSTEM_FOLDERS = {b"__macosx", b".appledouble", b".spotlight-v100", b".trashes", b".fseventsd"}
SYSTEM_FOLDERS |= {b"$recycle.bin", b"system volume information", b"found.000", b"lost+found", b"lost.dir"}
SYSTEM_FOLDERS |= {b"@eadir", b"@tmp", b"@recycle", b"@recently-snapshot", b"#recycle", b"#snapshot"}
SYSTEM_FOLDERS |= {b".snapshot", b".ipynb_checkpoints", b"__pycache__", b".thumbnails", b".git", b".svn"}
# a class may have such a name; a set whose classes all have one is a folder of sets
SPLIT = re.compile("(train|val|valid|validation|dev|test|eval)(ing|set|_set|_data)?[0-9]*", re.IGNORECASE)


@dataclass
class ClassFolder:
    """A class folder whose images were listed."""

    name: str
    has_images: bool = False  # in the folder itself
    subfolders: set[bytes] = field(default_factory=set)  # with images
    first: bytes = b""
    last: bytes = b""

    def add(self, path: bytes) -> None:
        """Add an image; paths are relative to SRC, and in the order of a walk."""
        folder, slash, _ = path.partition(b"/")[2].partition(b"/")
        if slash:
            self.subfolders.add(folder)
        else:
            self.has_images = True
        self.first, self.last = self.first or path, path

    @property
    def common(self) -> str:
        """The lowest folder that holds all images, relative to SRC; the first and the last tell it."""
        return os.fsdecode(os.path.commonpath([os.path.dirname(self.first), os.path.dirname(self.last)]))


def is_system_folder(name: bytes) -> bool:
    """Whether a folder is no part of the data."""
    name = name.lower()
    return name in SYSTEM_FOLDERS or name.startswith(b".trash")


def check_level(src: Path, folders: list[ClassFolder]) -> list[str]:
    """Notes on SRC's folders. Raises ShardError where SRC is a level above the classes."""
    filled = [folder for folder in folders if folder.first]
    names = [folder.name for folder in filled]
    are_splits = bool(names) and all(map(SPLIT.fullmatch, names))
    if are_splits and (len(names) > 1 or not filled[0].has_images):
        has_classes = any(folder.subfolders for folder in filled)
        option = "" if has_classes else " --unlabelled"
        raise ShardError(
            f"SRC '{src}' is one level too high: its folders {_list_names(names)} are parts of a data set, "
            f"not classes; make one set of each, such as `dmae-shards make {src / names[0]} DST{option}`, or "
            f"name them in --classes FILE if they are classes"
        )
    if len(filled) == 1 and not filled[0].has_images:
        common = filled[0].common
        if common not in (os.fsdecode(os.path.dirname(path)) for path in (filled[0].first, filled[0].last)):
            raise ShardError(
                f"SRC '{src}' is too high: all images are in folders below '{common}', which would be one "
                f"class; give SRC as '{src / common}', or --unlabelled, or name the class in --classes FILE "
                f"if it is the only one"
            )
    if len(filled) > 1 and not any(folder.has_images for folder in filled):
        return [
            f"all images are in folders below the class folders, first {os.fsdecode(filled[0].first)!r}: is "
            f"SRC one level too high?"
        ]
    return []


def check_classes(classes: list[str], used: set[int]) -> list[str]:
    """Notes on classes without an image, and on names that differ in their spelling alone."""
    notes = []
    empty = [name for label, name in enumerate(classes) if label not in used]
    if empty:
        notes.append(f"{len(empty):,} of {len(classes):,} classes are without an image: {_list_names(empty)}")
    by_spelling: dict[str, list[str]] = {}
    for name in classes:
        by_spelling.setdefault(_loose(name), []).append(name)
    alike = [names for names in by_spelling.values() if len(names) > 1]
    if alike:
        first = " and ".join(_show(name) for name in alike[0])
        more = f" ({len(alike):,} such groups)" if len(alike) > 1 else ""
        notes.append(f"{first} are {len(alike[0])} classes{more}; merge them in SRC if they are one")
    return notes


def _list_names(names: list[str]) -> str:
    more = f", and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(_show(name) for name in names[:5]) + more


def _show(name: str) -> str:
    """Name in quotes; other forms of the same letters are shown as escapes."""
    return repr(name) if unicodedata.normalize("NFC", name) == name else ascii(name)


def _loose(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()
