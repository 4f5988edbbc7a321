"""What stays of a results page when it is written again without the runs behind some of its sections."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dmae_ds.errors import UserError

SECTION = "### On "  # the heading of a data set's section
STUDY, PUBLISHED = "## The study", "## The papers' tables"
NUM_OURS = 4  # the last cells of a row of the papers' tables: ours, seed, hardware and cost


@dataclass(frozen=True)
class KeptPage:
    """Parts of a page, each as it stands there.

    sections: lines of each data set's section, by its name
    ours: our cells of each row of the papers' tables, by the text in front of them
    """

    sections: dict[str, list[str]] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)


def read_kept_page(path: Path, head: list[str]) -> KeptPage:
    """Read the page that `dmae-ds report --results` wrote, whose first lines are `head`.

    Raises UserError for another file, and for a page with a section that has no name to keep it by.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--keep: page '{path}' can't be read ({error}); write it once without --keep"
        ) from error
    if lines[: len(head)] != head or STUDY not in lines or PUBLISHED not in lines:
        raise UserError(f"--keep: '{path}' is no page of `dmae-ds report --results`; give another --out")
    study = lines[lines.index(STUDY) : lines.index(PUBLISHED)]
    sections: dict[str, list[str]] = {}
    of_section: list[str] = []
    for line in study:
        if line.startswith(SECTION):
            of_section = sections.setdefault(line[len(SECTION) :], [])
        elif not sections and line.startswith("|"):
            raise UserError(
                f"--keep: '{path}' has a section without a name; write it once without --keep, as NAME=FOLDER"
            )
        of_section.append(line)
    return KeptPage(sections, dict(map(split_row, filter(_is_row, lines[lines.index(PUBLISHED) :]))))


def split_row(line: str) -> tuple[str, str]:
    """A row of the papers' tables: the text of the published cells, and that of our own ones."""
    cells = re.split(r"(?<!\\)\|", line)  # with an empty text at both ends
    place = len(cells) - 1 - NUM_OURS
    return "|".join(cells[:place]), "|".join(cells[place:])


def _is_row(line: str) -> bool:
    return line.startswith("| ") and not line.startswith("| table ")
