"""Label maps and COCO annotations of the images of SRC: which image has which (`make --masks`, `--coco`).

Images and maps are matched by their paths below SRC and DIR without suffix, so ADE20K, VOC and any folder of
equal names are read alike. An image without a map, a map without an image, an image that the COCO file does
not have and one that SRC does not have are skipped files. data_prep/DENSE.md has the commands.
"""

import os
from array import array
from dataclasses import dataclass
from pathlib import Path

from data_prep.class_list import check_names, read_classes, read_rows, sort_by_number, split_cells
from data_prep.coco import CocoFile, read_coco
from data_prep.find import Listing, walk_images
from dmae_ds.data.dense_members import MAX_CLASSES, DenseInfo
from dmae_ds.data.shards import ANNOTATIONS, ShardError

EXIF = ("stored", "upright")


@dataclass(frozen=True)
class DenseOptions:
    """Options of `make` for maps and boxes."""

    masks: Path | None = None
    coco: Path | None = None
    num_classes: int | None = None  # of the maps; None: the lines of --classes
    zero_is_unlabelled: bool = False  # ADE20K's maps: 0 is no class, classes begin at 1
    ignore_label: int | None = None  # value of a map that is no class; None: 255, of 16 bits 65535
    exif: str | None = None  # one of EXIF: what maps and boxes of rotated images were drawn on

    def __bool__(self) -> bool:
        return self.masks is not None or self.coco is not None


@dataclass(frozen=True)
class DenseSettings:
    """What workers need to convert maps and boxes."""

    masks: bytes | None
    info: DenseInfo
    zero_is_unlabelled: bool
    ignore_label: int | None
    exif: str | None


@dataclass
class DenseListing:
    """Maps and annotations of a listing's images."""

    settings: DenseSettings
    coco: CocoFile | None
    names: dict[bytes, str]  # path of an image -> its file_name in the COCO file

    def plan(self) -> dict:
        """What determines the result, for journal and manifest."""
        import PIL

        settings = self.settings
        return {
            "dense": settings.info.entry(),
            "masks": settings.masks is not None,
            "zero_is_unlabelled": settings.zero_is_unlabelled,
            "ignore_label": settings.ignore_label,
            "exif": settings.exif,
            "coco_sha256": None if self.coco is None else self.coco.sha256,
            "pillow": PIL.__version__,  # another version may encode other bytes
        }

    def write_lines(self, dst: Path, listing: Listing, order: array, samples_per_shard: int) -> array | None:
        """Write the annotations of the images in `order`; returns the byte offset of each shard's first one.

        None without a COCO file.
        """
        if self.coco is None:
            return None
        offsets = array("Q")
        with open(dst / ANNOTATIONS, "wb") as file:  # written again by every run
            for place, image in enumerate(order):
                if place % samples_per_shard == 0:
                    offsets.append(file.tell())
                file.write(self.coco.line(self.names[listing.path(image)]).encode() + b"\n")
        return offsets


def check_dense(options: DenseOptions, *, src: Path, classes: Path | None) -> None:
    """Raise ShardError for options that contradict each other."""
    if options.masks is None:
        given = {
            "--zero-is-unlabelled": options.zero_is_unlabelled,
            "--ignore-label": options.ignore_label is not None,
            "--num-classes": options.num_classes is not None,
            "--exif": options.exif is not None and options.coco is None,
            "--classes": classes is not None and options.coco is not None,
        }
        unread = [name for name, is_given in given.items() if is_given]
        if unread:
            why = ", and the classes of boxes are the COCO file's categories" if options.coco else ""
            raise ShardError(f"{unread[0]} requires --masks{why}; add --masks DIR, or remove it")
        return
    if (classes is None) == (options.num_classes is None):
        raise ShardError(
            "--masks requires the number of its classes, once: add --classes FILE (a name a line), or "
            "--num-classes N"
        )
    if not options.masks.is_dir():
        raise ShardError(f"--masks '{options.masks}' is not a folder")
    if options.masks.resolve().is_relative_to(src.resolve()):
        raise ShardError(
            f"--masks '{options.masks}' is inside SRC '{src}', and its maps would be images, too; give the "
            f"folder of the images as SRC"
        )


def match_dense(
    src: Path, listing: Listing, options: DenseOptions, *, classes: Path | None, is_subset: bool
) -> tuple[Listing, DenseListing]:
    """Match the images with their maps and annotations; returns those that have all, and what they have.

    is_subset: whether `listing` has a part of SRC's images; then further maps and entries are no mistake
    Raises ShardError for files that cannot be used.
    """
    matched = Listing(ignored=listing.ignored, skipped=listing.skipped, notes=listing.notes)
    matched.has_links = listing.has_links
    coco = None if options.coco is None else read_coco(options.coco)
    paths = [listing.path(number) for number in range(len(listing))]
    names = {} if coco is None else _match_coco(paths, coco, matched, options.coco, is_subset=is_subset)
    maps = None if options.masks is None else _match_maps(paths, options, matched, is_subset=is_subset)
    for path in paths:
        if (coco is None or path in names) and (maps is None or map_name(path) in maps):
            matched.add(path, -1)
    if not len(matched):
        first = ""
        if matched.skipped:
            first = f", first {matched.skipped[0]['source']!r}: {matched.skipped[0]['reason']}"
        wanted = " and ".join(
            name
            for name, value in (("--masks", options.masks), ("--coco", options.coco))
            if value is not None
        )
        raise ShardError(f"no image of SRC '{src}' is matched by {wanted}{first}")
    info = DenseInfo(
        map_classes=None if options.masks is None else _name_classes(options, classes, matched),
        box_classes=None if coco is None else coco.classes,
        has_masks=coco is not None and coco.has_masks,
    )
    settings = DenseSettings(
        masks=None if options.masks is None else os.fsencode(options.masks),
        info=info,
        zero_is_unlabelled=options.zero_is_unlabelled,
        ignore_label=options.ignore_label,
        exif=options.exif,
    )
    return matched, DenseListing(settings, coco, names)


def map_name(path: bytes) -> bytes:
    """Path of an image's map below DIR, where the map's suffix is in small letters."""
    return os.path.splitext(path)[0] + b".png"


def map_file(folder: bytes, path: bytes) -> bytes:
    """Path of the file of an image's map, which ends in .png or .PNG."""
    small = b"%b/%b" % (folder, map_name(path))
    large = small.removesuffix(b".png") + b".PNG"
    return large if not os.path.lexists(small) and os.path.lexists(large) else small


def _match_maps(
    paths: list[bytes], options: DenseOptions, listing: Listing, *, is_subset: bool
) -> set[bytes]:
    """Paths of the maps below DIR; what is without its other half is added to the skipped files."""
    folder, skipped = options.masks, {entry["source"] for entry in listing.skipped}
    maps = _find_maps(folder, listing.skipped)
    _refuse_unclear_zero(options, maps)
    wanted: dict[bytes, bytes] = {}
    for path in paths:
        name = map_name(path)
        if name in wanted:
            raise ShardError(
                f"{os.fsdecode(wanted[name])!r} and {os.fsdecode(path)!r} of SRC have one map, "
                f"'{folder / os.fsdecode(name)}'; rename one of them"
            )
        wanted[name] = path
        if name not in maps and os.fsdecode(path) not in skipped:
            listing.skip(path, f"no label map {folder / os.fsdecode(name)}")
    without = sorted(maps - wanted.keys())
    if is_subset and without:
        listing.notes.append(f"{len(without):,} maps of --masks belong to other images")
    elif without:
        for name in without:
            listing.skip(b"%b/%b" % (os.fsencode(folder), name), "a label map without an image in SRC")
    return maps


def _find_maps(folder: Path, skipped: list[dict]) -> set[bytes]:
    """Paths of the .png files below a folder, as `map_name` spells them.

    Folders that cannot be read are added to `skipped`.
    """
    listing = Listing(suffixes=(b".png",), skipped=skipped)
    found = set(walk_images(folder, b"", listing, []))
    if not found:
        raise ShardError(f"--masks '{folder}' has no .png files; expected the path of each image, with .png")
    maps = set()
    for name in sorted(found):
        small = map_name(name) if name.endswith(b".PNG") else name
        if small in maps:
            both = f"{os.fsdecode(small)!r} and {os.fsdecode(small.removesuffix(b'.png') + b'.PNG')!r}"
            raise ShardError(f"--masks '{folder}' has {both}, maps of one image; remove one of them")
        maps.add(small)
    return maps


def _refuse_unclear_zero(options: DenseOptions, maps: set[bytes]) -> None:
    """Raise ShardError where maps look like ADE20K's, and no option says whether their 0 is a class."""
    if options.zero_is_unlabelled or options.ignore_label is not None:
        return
    folder = options.masks.resolve()
    looks_like_it = any((parent / "objectInfo150.txt").exists() for parent in folder.parents[:2])
    if looks_like_it or any(os.path.basename(name).startswith(b"ADE_") for name in maps):
        raise ShardError(
            f"--masks '{options.masks}' looks like ADE20K's, whose value 0 is no class and whose classes "
            f"begin at 1: add --zero-is-unlabelled, or --ignore-label 255 if 0 is a class here"
        )


def _match_coco(
    paths: list[bytes], coco: CocoFile, listing: Listing, file: Path, *, is_subset: bool
) -> dict[bytes, str]:
    """file_name of each image of SRC, by its path or, where that is unique, by its base name."""
    by_base: dict[str, list[str]] = {}
    for name in coco.images:
        by_base.setdefault(name.rpartition("/")[2], []).append(name)
    names, owners = {}, {}
    for path in paths:
        text = os.fsdecode(path)
        same = by_base.get(text.rpartition("/")[2], [])
        name = text if text in coco.images else same[0] if len(same) == 1 else None
        if name is None:
            reason = (
                f"no image entry in --coco {file}" if not same else f"{len(same)} entries in --coco {file}"
            )
            listing.skip(path, reason)
        elif name in owners:
            raise ShardError(
                f"{owners[name]!r} and {text!r} of SRC are both the image {name!r} of --coco '{file}'; "
                f"rename one"
            )
        else:
            names[path], owners[name] = name, text
    missing = [name for name in coco.images if name not in owners]
    if is_subset and missing:
        listing.notes.append(f"{len(missing):,} images of --coco are not among these")
    elif missing:
        for name in missing:
            reason = f"an image of --coco {file} that SRC does not have"
            listing.skipped.append({"number": None, "source": name, "reason": reason})
    return names


def _name_classes(options: DenseOptions, classes: Path | None, listing: Listing) -> list[str]:
    """Names of the maps' classes. Raises ShardError."""
    if classes is None:
        names = [str(number) for number in range(options.num_classes)]
    else:
        names = read_class_names(classes, "--classes", listing.notes)
    if len(names) > MAX_CLASSES:
        raise ShardError(f"{len(names):,} classes; a label map of 16 bits holds {MAX_CLASSES:,}")
    if options.ignore_label is not None and options.ignore_label > MAX_CLASSES:
        raise ShardError(f"--ignore-label {options.ignore_label}: a label map holds 0 to {MAX_CLASSES:,}")
    return names


def read_class_names(path: Path, option: str, notes: list[str] | None = None) -> list[str]:
    """Names of classes in the order of their numbers, one a line or in the column `Name` of a table.

    notes: what was left out is added here. Raises ShardError.
    """
    return _named_column(path, option) or read_classes(path, notes=notes)


_NUMBERS = {"idx", "index", "id", "number", "label"}


def _named_column(path: Path, option: str) -> list[str] | None:
    """The column `Name` of a table with a header, such as ADE20K's objectInfo150.txt; None without one.

    The names are in the order of a column of numbers, where there is one of _NUMBERS.
    """
    rows = read_rows(path, option)
    for separator in "\t,;":
        header = [cell.lower() for cell in split_cells(rows[0].text, separator)]
        if len(header) > 1 and header.count("name") == 1:
            place = header.index("name")
            cells = [split_cells(row.text, separator) for row in rows[1:]]
            if not cells or not all(len(line) > place for line in cells):
                raise ShardError(f"{option} '{path}' has a header with a column Name, and lines without it")
            names = [line[place] for line in cells]
            check_names(path, names, option=option)
            for column in (place for place, title in enumerate(header) if title in _NUMBERS):
                texts = [line[column] if len(line) > column else "" for line in cells]
                if all(text.isdecimal() for text in texts):
                    return sort_by_number(path, [int(text) for text in texts], names, option=option)
            return names
    return None
