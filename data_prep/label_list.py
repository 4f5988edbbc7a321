"""Match the lines of --labels FILE, `<image> <label>`, with the images of SRC.

A line is cut where its name is that of an image: at a tab, a comma, a semicolon or a blank, with or
without quotes; so names and labels may have blanks. A name may lack its suffix or its folders, have `./`,
backslashes or a folder in front, or be spelled in the other form of Unicode. A header line is left out.
Nothing is guessed: a base name of several images means none of them, and lines without an image are reported.
"""

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from data_prep.class_list import (
    SEPARATORS,
    Row,
    plain_path,
    read_classes,
    read_rows,
    readable,
    split_cells,
    unquote,
)
from dmae_ds.data.shards import ShardError

MAX_LABEL = 10**6  # a larger one is a mistake; the table of classes is a list
SEPARATORS_AND_BLANKS = " " + SEPARATORS
SAMPLED = 2000  # lines by which the form of the list is recognized
CUTS = (*SEPARATORS, "last word", "first word")
NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")  # 3.0 is a number of pandas'
# Kaggle's LOC_val_solution.csv: the class, and its boxes
BOXES = re.compile(r"(\S+)(?: [0-9]+){4}(?: \1(?: [0-9]+){4})*")
# names of columns, without underlines
IMAGE_WORDS = {"image", "images", "imageid", "imagename", "imagepath", "img", "imgid", "imgname", "imgpath"}
IMAGE_WORDS |= {"file", "files", "filename", "filepath", "path", "relativepath", "fname", "name", "id"}
LABEL_WORDS = {"label", "labels", "labelid", "labelname", "class", "classes", "classid", "classname"}
LABEL_WORDS |= {"category", "categoryid", "categoryname", "target", "targets", "y", "breed", "species"}
SUFFIX = re.compile(r"\.(jpe?g?|png)", re.IGNORECASE)


class Match(NamedTuple):
    """A line with the name and the label in it, and the images that the name means."""

    row: Row
    name: str
    label: str
    images: tuple[int, ...] = ()


@dataclass
class Labels:
    """Label of each image, by its number; `notes` are for the user."""

    classes: list[str]
    labels: dict[int, int]
    unmatched: list[Match] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def _unmatched_by_name(self) -> dict[str, Match]:
        return {_loose(match.name): match for match in self.unmatched}

    def reason(self, path: str, list_name: str) -> str:
        """Why an image has no label, with the line that may mean it."""
        near = self._unmatched_by_name.get(_loose(path)) if self.unmatched else None
        also = f"; line {near.row.number} has {near.name!r}" if near else ""
        return f"no label in {list_name}{also}"


class ImageNames:
    """The images of SRC by every name that a line may have for them."""

    def __init__(self, paths: list[str]):
        self.paths = paths
        self._exact = {path: (number,) for number, path in enumerate(paths)}
        self._other: dict[str, tuple[int, ...]] | None = None
        self.front = ""  # folders in front of the names in the list

    def find(self, name: str) -> tuple[int, ...]:
        """Numbers of the images that a name means: several where it lacks the suffix of two."""
        for spelled in dict.fromkeys((name, plain_path(name))):
            for form in (spelled, spelled.removeprefix(self.front)) if self.front else (spelled,):
                numbers = self._exact.get(form) or self._others().get(unicodedata.normalize("NFC", form))
                if numbers:
                    return numbers
        return ()

    def _others(self) -> dict[str, tuple[int, ...]]:
        """Images by name without suffix, and by base name where one image alone has it."""
        if self._other is None:
            stems, bases = {}, {}
            for number, path in enumerate(self.paths):
                path = unicodedata.normalize("NFC", path)
                stem, base = path.rpartition(".")[0], path.rpartition("/")[2]
                for form in (path, stem):
                    stems[form] = (*stems.get(form, ()), number)
                if base != path:
                    for form in (base, base.rpartition(".")[0]):
                        bases[form] = () if form in bases else (number,)
            self._other = bases | stems
        return self._other

    def find_front(self, names: list[str], folder: str) -> None:
        """Find the folders in front of most names; with equal rights those that end with SRC's own name."""
        fronts: Counter = Counter()
        for name in map(plain_path, names):
            parts = name.split("/")
            for place in range(1, len(parts)):
                rest = "/".join(parts[place:])
                if rest in self._exact or (unicodedata.normalize("NFC", rest) in self._others()):
                    fronts["/".join(parts[:place]) + "/"] += 1
                    break
        if fronts:
            ours = f"/{folder}/"
            self.front = max(fronts, key=lambda front: (f"/{front}".endswith(ours), fronts[front]))


def match_labels(path: Path, paths: list[bytes], src: Path, classes_file: Path | None) -> Labels:
    """Match a list with the images of SRC.

    paths: of the images, relative to SRC
    Raises ShardError for a list that cannot be used, with the line.
    """
    rows, where = read_rows(path, "--labels"), f"--labels '{path}'"
    names = ImageNames([os.fsdecode(image) for image in paths])
    cutter = _Cutter(rows, names, src.resolve().name, where)
    matches = [cutter.match(row) for row in rows]
    notes: list[str] = []
    matches = [match for match in matches if match.images or not match.row.text.startswith("#")]
    if _is_header(matches):
        notes.append(f"line {matches[0].row.number} of {path.name} is a header: {matches[0].row.text[:80]!r}")
        del matches[0]
    found = [match for match in matches if match.images]
    if not found:
        first = matches[0].name if matches else ""
        image = f"{names.paths[0]!r} is the first image" if paths else "SRC has no images"
        raise ShardError(
            f"{where}: none of its {len(matches):,} lines names an image of SRC '{src}': "
            f"line {rows[0].number if not matches else matches[0].row.number} has {first!r}, {image}; "
            f"write names relative to SRC"
        )
    matches = _clean_labels(matches, where, notes)
    by_image = _by_image([match for match in matches if match.images], where)
    classes, label_of = _number_classes(matches, classes_file, where, notes)
    unmatched = [match for match in matches if not match.images]
    if unmatched:
        near = unmatched[0]
        notes.append(
            f"{len(unmatched):,} of {len(matches):,} lines of {path.name} name no image of SRC, first line "
            f"{near.row.number}: {near.name!r}"
        )
    labels = {image: label_of[match.label] for image, match in by_image.items()}
    return Labels(classes, labels, unmatched, notes)


class _Cutter:
    """The places where lines of a list are cut into name and label."""

    def __init__(self, rows: list[Row], names: ImageNames, folder: str, where: str):
        self.names, self.where = names, where
        header = next((row.text for row in rows if not row.text.startswith("#")), "")
        self.layouts = {cut: _layout(split_cells(header, cut)) for cut in SEPARATORS}
        step = max(1, len(rows) // SAMPLED)
        sample = [row.text for row in rows[::step]]
        pairs = {cut: [pair for text in sample if (pair := self._cut(text, cut))] for cut in CUTS}
        names.find_front([name for cut in CUTS for name, _ in pairs[cut]], folder)
        votes = {cut: sum(bool(names.find(name)) for name, _ in pairs[cut]) for cut in CUTS}
        if not any(votes.values()):
            votes = {cut: len(pairs[cut]) for cut in CUTS}
        self.order = sorted(CUTS, key=lambda cut: -votes[cut])  # stable: a tab before a comma

    def match(self, row: Row) -> Match:
        """Cut a line. Raises ShardError where it cannot be cut at all."""
        first = None
        for cut in self.order:
            pair = self._cut(row.text, cut)
            if pair is None:
                continue
            for name in dict.fromkeys((pair[0], readable(pair[0]))):
                images = self.names.find(name)
                if images:
                    return Match(row, name, readable(pair[1]), images)
            first = first or Match(row, readable(pair[0]), readable(pair[1]))
        cells = max((split_cells(row.text, separator) for separator in SEPARATORS), key=len)
        is_cut = first is not None and (len(cells) <= 2 or any(self.layouts.values()))
        if not is_cut or self.names.find(row.text.strip(SEPARATORS_AND_BLANKS)):
            columns = f" in {len(cells)} columns" if len(cells) > 2 else ""
            raise ShardError(
                f"{self.where} line {row.number}: found {row.text[:80]!r}{columns}, expected "
                f"`<image> <label>`; keep these two columns alone, or name them in a header: image, label"
            )
        return first

    def _cut(self, text: str, cut: str) -> tuple[str, str] | None:
        """(name, label) of a line; None where it has no such cut."""
        if len(cut) == 1:
            cells = split_cells(text, cut)
            layout = self.layouts[cut]
            if layout is not None and len(cells) > max(layout):
                return cells[layout[0]], cells[layout[1]]
            if len(cells) != 2:
                return None
            is_swapped = SUFFIX.search(cells[1]) and not SUFFIX.search(cells[0])
            return (cells[1], cells[0]) if is_swapped else (cells[0], cells[1])
        if '"' in text:
            cells = [cell for cell in split_cells(text, " ") if cell]
            if len(cells) == 2:
                return cells[0], cells[1]
        words = text.rsplit(None, 1) if cut == "last word" else text.split(None, 1)
        if len(words) != 2:
            return None
        return unquote(words[0].rstrip(SEPARATORS_AND_BLANKS)), unquote(words[1])


def _layout(cells: list[str]) -> tuple[int, int] | None:
    """(place of the name, place of the label) where the cells are a header with these columns."""
    words = [cell.lower().replace("_", "").replace(" ", "") for cell in cells]
    names = [place for place, word in enumerate(words) if word in IMAGE_WORDS]
    labels = [place for place, word in enumerate(words) if word in LABEL_WORDS]
    labels = [place for place in labels if words[place] == "label"] or labels
    images = [place for place in names if words[place] not in ("id", "name")] or names
    if len(images) != 1 or len(labels) != 1:
        return None
    return images[0], labels[0]


def _is_header(matches: list[Match]) -> bool:
    """Whether the first line has names of columns: no image, and a label that no other line has."""
    first, others = matches[0] if matches else None, matches[1:]
    if (
        first is None
        or first.images
        or SUFFIX.search(first.name)
        or not any(match.images for match in others)
    ):
        return False
    if NUMBER.fullmatch(first.label):
        return False
    return all(match.label != first.label for match in others)


def _clean_labels(matches: list[Match], where: str, notes: list[str]) -> list[Match]:
    """Matches with labels that are numbers or names. Raises ShardError for a mixture, and for none."""
    empty = next((match for match in matches if not match.label), None)
    if empty is not None:
        raise ShardError(
            f"{where} line {empty.row.number}: found {empty.row.text[:80]!r} without a label, expected "
            f"`<image> <label>`; complete or remove the line"
        )
    if all(BOXES.fullmatch(match.label) for match in matches):
        notes.append("boxes behind the labels are left out")
        return [match._replace(label=BOXES.fullmatch(match.label)[1]) for match in matches]
    return matches


def _by_image(matches: list[Match], where: str) -> dict[int, Match]:
    """The line of each image. Raises ShardError where two lines give it two labels."""
    by_image: dict[int, Match] = {}
    for match in matches:
        for image in match.images:
            other = by_image.setdefault(image, match)
            if other.label != match.label:
                raise ShardError(
                    f"{where} line {match.row.number}: '{match.name}' has two labels, '{match.label}' here "
                    f"and '{other.label}' in line {other.row.number}; remove one of them"
                )
    return by_image


def _number_classes(
    matches: list[Match], classes_file: Path | None, where: str, notes: list[str]
) -> tuple[list[str], dict[str, int]]:
    """(classes, number of each label). Raises ShardError for a label that is neither a name nor a number."""
    first_of: dict[str, Match] = {}
    for match in matches:
        first_of.setdefault(match.label, match)
    numbers = {label: int(NUMBER.fullmatch(label)[1]) for label in first_of if NUMBER.fullmatch(label)}
    if classes_file is not None:
        classes = read_classes(classes_file, [label for label in first_of if label not in numbers], notes)
    elif len(numbers) == len(first_of):
        largest = max(numbers.values())
        if largest > MAX_LABEL:
            raise ShardError(f"{where}: the label {largest} is larger than {MAX_LABEL:,}; number from 0")
        return [str(label) for label in range(largest + 1)], numbers
    elif numbers:
        _refuse_mixture(matches, numbers, where)
    else:
        classes = sorted(first_of)
    label_of = {name: label for label, name in enumerate(classes)}
    for label, match in first_of.items():
        if label not in label_of:
            if numbers.get(label, MAX_LABEL) >= len(classes):
                raise ShardError(
                    f"{where} line {match.row.number}: the label '{label}' is neither one of the "
                    f"{len(classes):,} classes of --classes ('{classes[0]}' is the first) nor the number of "
                    f"one; give it a line in --classes FILE"
                )
            label_of[label] = numbers[label]
    return classes, label_of


def _refuse_mixture(matches: list[Match], numbers: dict[str, int], where: str) -> None:
    """Raise ShardError for labels of which some are numbers, with the first of the rarer kind."""
    kinds = {"number": [], "name": []}
    for match in matches:
        kinds["number" if match.label in numbers else "name"].append(match)
    rare = min(kinds.values(), key=len)[0]
    raise ShardError(
        f"{where} line {rare.row.number}: found the label '{rare.label}', but {len(kinds['number']):,} lines "
        f"have numbers and {len(kinds['name']):,} have names; write one or the other, or list all classes in "
        f"--classes FILE"
    )


def _loose(name: str) -> str:
    """Base name without suffix, and without differences that are easily overlooked."""
    base = plain_path(name).rpartition("/")[2]
    base = SUFFIX.sub("", unicodedata.normalize("NFKC", base))
    return re.sub(r"[\s_-]+", "", base).casefold()
