"""Read text lists as people write them, and the list of classes, --classes FILE.

A list may be UTF-8 with or without a byte order mark, UTF-16 with one, or Windows-1252; lines may end as on
any system. A line of --classes is a name, or has columns of which one is the name: `n01440764 tench`,
`0,ant`, `"golden retriever"`, `./train/ant/`. A header line is left out, and lines that are numbered count
in the order of their numbers.
"""

import codecs
import csv
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from dmae_ds.data.shards import ShardError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SEPARATORS = "\t,;"
IDENTIFIER = re.compile("[A-Za-z]+[0-9]+")  # n01440764
# without underlines
HEADER_WORDS = {"class", "classes", "classname", "category", "label", "labels", "name", "names", "synset"}
HEADER_WORDS |= {"synsets", "wnid", "wnids", "id", "ids", "classid", "labelid", "labelname", "categoryid"}
HEADER_WORDS |= {"index", "idx", "number", "folder", "target", "species", "breed"}


class Row(NamedTuple):
    """A line of a list that is not empty."""

    number: int  # of the line, from 1
    text: str


def read_rows(path: Path, option: str) -> list[Row]:
    """Lines that are not empty, stripped; bytes that are not UTF-8 are surrogates (`readable`).

    Raises ShardError for a file that is not text, or has no lines.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{option} '{path}' cannot be read: {error.strerror}") from None
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding, "strict" if "16" in encoding else "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ShardError(f"{option} '{path}' is not a text file; save it as text or CSV, in UTF-8")
    lines = enumerate(re.split("\r\n|\n|\r", text), start=1)
    rows = [Row(number, line.strip()) for number, line in lines if line.strip()]
    if not rows:
        raise ShardError(f"{option} '{path}' is empty")
    return rows


def readable(text: str) -> str:
    """Text whose bytes were not UTF-8, as Windows-1252 or, where that has no letter, Latin-1."""
    data = text.encode("utf-8", "surrogateescape")
    for encoding in ("utf-8", "cp1252"):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    return data.decode("latin-1")


def split_cells(text: str, separator: str) -> list[str]:
    """Cells of a line, stripped and without quotes; empty ones at its end are left out."""
    try:
        cells = next(csv.reader([text], delimiter=separator, skipinitialspace=True))
    except (csv.Error, StopIteration):
        return [text]
    cells = [unquote(cell) for cell in cells]
    while len(cells) > 1 and not cells[-1]:
        cells.pop()
    return cells


def unquote(text: str) -> str:
    """Text without blanks and one pair of quotes around it."""
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].strip() if is_quoted else text


def plain_path(text: str) -> str:
    """Name with slashes, and without `./` in front or a slash at its end."""
    return re.sub(r"^(\./+)+", "", text.replace("\\", "/")).rstrip("/")


def read_classes(path: Path, known: Collection[str] = (), notes: list[str] | None = None) -> list[str]:
    """Names of the classes in the order of their numbers.

    known: folders or labels, by which the name in a line is recognized
    notes: what was left out is added here. Raises ShardError.
    """
    notes, known = [] if notes is None else notes, set(known)
    rows = read_rows(path, "--classes")
    _refuse_gaps(path, rows)
    texts = [row.text for row in rows]
    if not all(row.text.isascii() for row in rows):
        texts = [text if text in known else readable(text) for text in texts]
    if _is_header(texts, known):
        notes.append(f"line {rows[0].number} of {path.name} is a header: {texts[0]!r}")
        del texts[0], rows[0]
    names = _choose(texts, known)
    numbered = _split_numbers(texts)
    if numbered is not None:
        numbers, rests = numbered
        others = _choose(rests, known)
        are_names = 0 < _count(others, known) >= _count(names, known)
        if are_names or (not known and _are_labels(numbers) and len(set(others)) == len(others)):
            names = sort_by_number(path, numbers, others)
    check_names(path, names)
    return names


def check_names(path: Path, names: list[str], *, option: str = "--classes") -> None:
    """Raise ShardError for a class that is named twice, or not at all."""
    twice = next((name for name, count in Counter(names).items() if count > 1 or not name), None)
    if twice is not None:
        found = f"the class '{twice}' twice" if twice else "a class without a name"
        raise ShardError(f"{option} '{path}' has {found}; correct one of its lines")


def _refuse_gaps(path: Path, rows: list[Row]) -> None:
    """Raise ShardError for an empty line between names: every later class would get another number."""
    previous = 0
    for row in rows:
        if row.number != previous + 1:
            raise ShardError(
                f"--classes '{path}' line {previous + 1} is empty, and the number of a line is the label of "
                f"its class; remove the line, or give it a name"
            )
        previous = row.number


def _forms(text: str) -> dict[str, str]:
    """Names that a line may mean, the most literal one first."""
    forms = {"line": unquote(text)}
    for separator in SEPARATORS:
        cells = split_cells(text, separator)
        if len(cells) > 1:
            forms |= {f"{separator}{place}": cell for place, cell in enumerate(cells)}
    forms["word"] = unquote(text.split()[0].rstrip(",;"))
    for kind, form in list(forms.items()):
        forms[f"{kind} path"] = plain_path(form)
        forms[f"{kind} base"] = plain_path(form).rpartition("/")[2]
    return {kind: form for kind, form in forms.items() if form}


def _choose(texts: list[str], known: set[str]) -> list[str]:
    """Name of each line: the form that is known, else the form that most of the others have."""
    forms = [_forms(text) for text in texts]
    kinds = [next((kind for kind, form in line.items() if form in known), None) for line in forms]
    usual = Counter(kind for kind in kinds if kind is not None).most_common(1)
    if usual and usual[0][0] != "line":
        fallback = usual[0][0]
    else:
        first_words = [line["word"] for line in forms]
        are_ids = len(set(first_words)) == len(texts) and all(map(IDENTIFIER.fullmatch, first_words))
        fallback = "word" if are_ids else "line"
    return [
        line[kind] if kind is not None else line.get(fallback, line["line"])
        for line, kind in zip(forms, kinds, strict=True)
    ]


def _count(names: list[str], known: set[str]) -> int:
    return sum(name in known for name in names)


def _is_header(texts: list[str], known: set[str]) -> bool:
    """Whether the first line has words for columns alone, none of which is a known name."""
    words = re.split(r"[\t,; ]+", texts[0].strip("\"',; #"))
    words = [word.strip("\"'").lower().replace("_", "") for word in words if word]
    is_known = any(form in known for form in _forms(texts[0]).values())
    return len(texts) > 1 and not is_known and bool(words) and set(words) <= HEADER_WORDS


def _split_numbers(texts: list[str]) -> tuple[list[int], list[str]] | None:
    """(numbers, rests of the lines), where every line begins or every line ends with a whole number."""
    for pattern in (r"(?P<n>QNQ)[\s,;:]+(?P<rest>.*\S)", r"(?P<rest>.*?[^\s,;:])[\s,;:]+(?P<n>QNQ)"):
        matches = [re.fullmatch(pattern.replace("QNQ", '"?[0-9]{1,7}"?'), text) for text in texts]
        if all(matches):
            return [int(match["n"].strip('"')) for match in matches], [match["rest"] for match in matches]
    return None


def _are_labels(numbers: list[int]) -> bool:
    """Whether the numbers are each of 0 to n - 1, or of 1 to n, once."""
    first = min(numbers)
    return first <= 1 and sorted(numbers) == list(range(first, first + len(numbers)))


def sort_by_number(
    path: Path, numbers: list[int], names: list[str], *, option: str = "--classes"
) -> list[str]:
    """Names by their numbers, which begin at 0 or 1. Raises ShardError for other numbers."""
    first = min(numbers)
    if not _are_labels(numbers):
        raise ShardError(
            f"{option} '{path}' has numbers from {first} to {max(numbers)} in its {len(numbers)} lines, "
            f"expected each of 0 to {len(numbers) - 1} once; leave the numbers out, or complete them"
        )
    return [name for _, name in sorted(zip(numbers, names, strict=True))]
