"""Choose images of many kinds from a folder of class folders, and store them as shards of two parts.

    python launch/clipart.py SRC OUT     # SRC/<class>/**/<image>, as Debian's openclipart-png has them

    OUT/images/{train,val}/<class>/**/<image>   links to the chosen images of SRC
    OUT/images/source.txt                       SRC, so that another one is refused
    OUT/left_out.tsv                            every other image of SRC, and why
    OUT/shards/{train,val}                      of `dmae-shards make --resize 96`

All numbers are below. Of images that are alike the first by name stays, whatever its class, and files come
before links to them: so no image of `val` is like one of `train`. Two images are alike where, laid on white
and shrunk to 16x16, their ink (255 minus the pixel) differs by less than a fifth of the larger ink, as norms:
by sight, cards with another border and icons with another badge differ by less, and different faces, flags
and signs by more than a quarter. A difference of the pixels themselves calls all thin drawings alike. Every
image is compared with all before it: a minute for 7,000, hours for 100,000.
"""

import argparse
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.cli import main as dmae_shards
from data_prep.find import find_images
from dmae_ds.data.decode import decode_bytes
from dmae_ds.data.shards import ShardError

SEED = 0  # of the draws of images and parts
NO_CLASSES = {"unsorted"}  # folders whose name says that they are no class
MIN_IMAGES, MAX_IMAGES = 60, 400  # of a class; of more, so many are drawn
SHARE_VAL = 0.2  # of each class
SHORT_SIDE = 96  # px; smaller images stay as they are
SAMPLES_PER_SHARD = 500
SOURCE = "source.txt"
SIDE, MAX_DIFFERENCE = 16, 0.2  # px and share of the ink, for images that are alike
MIN_INK = 1e-3  # mean share of full ink, below which an image is blank


class Alike:
    """The images that were kept so far, and which of them a further image is like."""

    def __init__(self, num_images: int):
        self.names: list[str] = []
        self._ink = np.empty((num_images, 3 * SIDE**2), np.float32)
        self._norms = np.empty(num_images, np.float32)

    def find(self, ink: np.ndarray) -> str | None:
        """Name of the kept image that is most like this one; None where none is."""
        if not self.names:
            return None
        kept, norms, norm = self._ink[: len(self.names)], self._norms[: len(self.names)], np.linalg.norm(ink)
        squares = norms**2 + norm**2 - 2 * kept @ ink
        differences = np.sqrt(squares.clip(0)) / np.maximum(norms, norm)
        nearest = int(differences.argmin())
        return self.names[nearest] if differences[nearest] < MAX_DIFFERENCE else None

    def keep(self, name: str, ink: np.ndarray) -> None:
        """Add an image."""
        self._ink[len(self.names)], self._norms[len(self.names)] = ink, np.linalg.norm(ink)
        self.names.append(name)


def read_ink(file: Path) -> np.ndarray:
    """Ink of an image on white, shrunk: [3 x SIDE x SIDE], 0 to 1. Raises ValueError with a reason."""
    image = Image.fromarray(decode_bytes(file.read_bytes()))
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    ink = 1 - small.reshape(-1) / 255
    if ink.mean() < MIN_INK:
        raise ValueError("blank")
    return ink


def choose(src: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Choose the images: (names by class, shuffled; reasons of the others by name), relative to SRC.

    Files of other kinds and small classes are told on stderr. Raises ShardError for a folder without class
    folders or images.
    """
    if src.is_dir() and not any(entry.is_dir() for entry in src.iterdir()):
        raise ShardError(f"SRC '{src}' has no class folders; expected SRC/<class>/<image>")
    listing = find_images(src)
    for note in listing.notes:
        print(note, file=sys.stderr)
    names = [listing.path(number).decode(errors="surrogateescape") for number in range(len(listing))]
    left_out = {item["source"]: item["reason"] for item in listing.skipped}
    names.sort(key=lambda name: ((src / name).is_symlink(), name))
    alike, files, classes = Alike(len(names)), {}, {}
    for name in names:
        kind, file = name.partition("/")[0], (src / name).resolve()
        try:
            if kind in NO_CLASSES:
                raise ValueError("its folder is no class")
            if file in files:
                raise ValueError(f"the same file as {files[file]}")
            ink = read_ink(file)
            if (other := alike.find(ink)) is not None:
                raise ValueError(f"like {other}")
        except (OSError, ValueError) as error:
            left_out[name] = getattr(error, "strerror", None) or str(error)
            continue
        files[file] = name
        alike.keep(name, ink)
        classes.setdefault(kind, []).append(name)
    small: list[str] = []
    for kind, members in sorted(classes.items()):
        if len(members) < MIN_IMAGES:
            left_out |= dict.fromkeys(classes.pop(kind), f"a class of fewer than {MIN_IMAGES} images")
            small.append(f"{kind} ({len(members)})")
            continue
        drawn = random.Random(f"{SEED} {kind}").sample(sorted(members), min(len(members), MAX_IMAGES))
        left_out |= dict.fromkeys(set(members) - set(drawn), f"not among {MAX_IMAGES} drawn")
        classes[kind] = drawn
    if small and classes:
        print(f"classes of fewer than {MIN_IMAGES} images: {', '.join(small)}", file=sys.stderr)
    return classes, left_out


def write_subset(src: Path, out: Path) -> None:
    """Write OUT/left_out.tsv, then OUT/images. Raises ShardError where no class is large enough."""
    classes, left_out = choose(src)
    if not classes:
        name, reason = min(left_out.items())
        raise ShardError(
            f"SRC '{src}' has no class with {MIN_IMAGES} images that differ, of {len(left_out):,} images; "
            f"first {name!r}: {reason}"
        )
    making = out / "images.tmp"
    shutil.rmtree(making, ignore_errors=True)
    for names in classes.values():
        for number, name in enumerate(names):
            link = making / ("val" if number < SHARE_VAL * len(names) else "train") / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((src / name).resolve())
    lines = [f"{name}\t{reason}\n" for name, reason in sorted(left_out.items())]
    (out / "left_out.tsv").write_text("".join(lines), errors="surrogateescape")
    (making / SOURCE).write_bytes(os.fsencode(src))
    making.rename(out / "images")
    print(
        f"{sum(map(len, classes.values())):,} images of {len(classes)} classes; {len(left_out):,} left out, "
        f"and why: {out / 'left_out.tsv'}"
    )


def check_source(src: Path, out: Path) -> None:
    """Raise ShardError where OUT has the images of another SRC."""
    file = out / "images" / SOURCE
    if file.exists() and (before := os.fsdecode(file.read_bytes())) != str(src):
        raise ShardError(
            f"OUT '{out}' has images of '{before}', now SRC is '{src}'; give another OUT, or remove "
            f"'{out}/images' and '{out}/shards'"
        )


def main(argv: list[str] | None = None) -> int:
    """Write what is missing of subset and shards; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("src", type=Path, metavar="SRC")
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    try:
        if not (args.out / "images").exists():
            args.out.mkdir(parents=True, exist_ok=True)
            write_subset(args.src.resolve(), args.out)
        check_source(args.src.resolve(), args.out)
    except (ShardError, OSError) as error:
        print(f"clipart.py: error: {error}", file=sys.stderr)
        return 2
    for part in ("train", "val"):
        options = ["--resize", str(SHORT_SIDE), "--samples-per-shard", str(SAMPLES_PER_SHARD)]
        if dmae_shards(["make", f"{args.out}/images/{part}", f"{args.out}/shards/{part}", *options]):
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
