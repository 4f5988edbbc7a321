"""From a folder of images to shard folders, held-out images apart (no torch).

    FOLDER/image             flat: no labels             a tenth is held out, at most 1,000
    FOLDER/class/image       class folders: labels       likewise
    FOLDER/train, FOLDER/val each flat or class folders  taken as they are
    FOLDER/manifest.json     shards already              used where they are, nothing is held out

The conversion is `dmae-shards make` with its journal: finished shards are used again, and after a kill the
same call continues.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

from data_prep.find import SUFFIXES, find_images
from data_prep.folders import is_system_folder
from data_prep.make import MakeOptions, make_shards
from data_prep.target import OtherSetError
from dmae_ds.data.shards import MANIFEST
from dmae_ds.errors import UserError
from dmae_ds.output.lines import is_quiet


@dataclass(frozen=True)
class Part:
    """A folder of one part. kind: shards, classes or flat; note: what is not read as labels, and why."""

    folder: Path
    kind: str
    note: str = ""

    @property
    def text(self) -> str:
        return _ABOUT[self.kind] + self.note


@dataclass(frozen=True)
class Source:
    """What FOLDER holds. val: where FOLDER has a part of that name."""

    train: Part
    val: Part | None

    @property
    def has_shards_only(self) -> bool:
        return all(part.kind == "shards" for part in (self.train, self.val) if part is not None)

    @property
    def text(self) -> str:
        if self.val is None:
            return self.train.text
        return f"train ({self.train.text}) and val ({self.val.text})"


def find_source(folder: Path) -> Source:
    """Look at FOLDER. Raises UserError where there is no image that can be read."""
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "was not found"
        raise UserError(f"FOLDER '{folder}' {what}; give a folder of JPEG or PNG images, or of shards")
    folder = folder.resolve()
    try:
        names = {
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_left_out(entry.name)
        }
        parts = [_look_at(folder / name) for name in ("train", "val")] if names == {"train", "val"} else []
        train = parts[0] if parts else _look_at(folder)
    except OSError as error:
        raise UserError(f"FOLDER '{error.filename or folder}' cannot be read: {error.strerror}") from None
    return Source(train, parts[1] if parts else None)


_ABOUT = {"shards": "shards", "classes": "class folders", "flat": "images without labels"}


def make_parts(source: Source, dst: Path, *, hold_out: bool, max_skip: int) -> tuple[str, str | None]:
    """Make the shards that are missing below `dst`; returns the folders of training and held-out images.

    hold_out: whether images may be held out
    Raises UserError where shards can't be written, or `dst` has those of other images.
    """
    val = None
    if source.val is not None:
        val = _make(source.val, dst / "val", None, max_skip)
    elif hold_out and source.train.kind != "shards":
        val = _make(source.train, dst / "val", "val", max_skip)
    train = _make(source.train, dst / "train", None if source.val or not val else "train", max_skip)
    return train, val


def _make(part: Part, dst: Path, name: str | None, max_skip: int) -> str:
    if part.kind == "shards":
        return str(part.folder)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = MakeOptions(unlabelled=part.kind == "flat", part=name)
    try:
        with contextlib.redirect_stdout(io.StringIO()) if is_quiet() else contextlib.nullcontext():
            make_shards(part.folder, dst, options, num_workers=cores, max_skip=max_skip)
    except OtherSetError:
        raise UserError(
            f"'{dst}' has shards of other images than '{part.folder}' holds now, or was made with other "
            "options; delete it to make them again, or give --shards another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"shards of '{part.folder}' cannot be written to '{dst}' ({error.strerror}); give --shards a "
            "folder that can be written"
        ) from None
    return str(dst)


def _look_at(folder: Path) -> Part:
    """What a folder holds, by its first image. Raises ShardError where there is none, with what is there."""
    if (folder / MANIFEST).is_file():
        return Part(folder, "shards")
    first = _first_image(folder)
    if first is not None and first.parent == folder:
        return Part(folder, "flat", _describe_folders(first))
    if first is None:
        tars = sum(1 for path in folder.glob("*.tar"))
        if tars:
            raise UserError(
                f"FOLDER '{folder}' has {tars} tars without an index; make one: dmae-shards index {folder}"
            )
        find_images(folder, unlabelled=True)
    return Part(folder, "classes")


def _first_image(folder: Path) -> Path | None:
    """An image of a folder, or else of those below it; None where there is none."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_left_out(name)]
        images = [name for name in names if os.fsencode(name).lower().endswith(SUFFIXES) and name[0] != "."]
        if images:
            return Path(place, min(images))
    return None


def _describe_folders(image: Path) -> str:
    """What is said of folders of images that an image lies next to; empty where there are none."""
    entries = sorted(entry.name for entry in os.scandir(image.parent) if entry.is_dir())
    names = [name for name in entries if not _is_left_out(name) and _first_image(image.parent / name)]
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"; {len(names)} folders ({shown}) are not read as classes, as images such as '{image.name}' lie "
        "next to them; move those to have labels"
    )


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or is_system_folder(os.fsencode(name))
