"""Text tables for a terminal, and rows of tables in Markdown."""

from __future__ import annotations

from typing import Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Format a table as lines, with columns two spaces apart, aligned on the right.

    rows: the headings first; left: indices of the columns that are aligned on the left
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def markdown_row(*cells: str) -> str:
    """Format a row of a table in Markdown."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
