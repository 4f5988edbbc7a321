"""The page: what is wrong, the facts in a table, and sections that each begin by saying how to read them. HTML and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from dmae_ds import __version__
from dmae_ds.evaluate.facts import Fact
from dmae_ds.report.figures import NUM_SERIES
from dmae_ds.report.style import style


@dataclass(frozen=True)
class Section:
    """A heading, one sentence or two on how to read what follows, and that, as HTML."""

    title: str
    note: str
    body: str


def render_page(
    names: list[str], alarms: list[tuple[str, str]], columns: list[dict[str, Fact]], sections: list[Section]
) -> str:
    """The whole page. alarms: (what, sentence); columns: a run's facts each; a section's body is HTML, all else is text to be escaped."""
    title = escape(", ".join(names)) if len(names) < 4 else f"{len(names)} runs"
    warnings = "".join(
        f'<p class="alarm" role="alert"><b>{escape(what)}.</b> {escape(sentence)}</p>'
        for what, sentence in alarms
    )
    parts = "".join(
        f'<section><h2>{escape(part.title)}</h2><p class="note">{escape(part.note)}</p>{part.body}</section>'
        for part in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title} - dmae-ds report</title><style>{style()}</style></head>
<body><header><p>dmae-ds report</p><h1>{title}</h1></header>{warnings}
<section><div class="scroll">{_table(names, columns)}</div>
<p class="note">Losses, shares and ranks are means over the last tenth of the steps that have them.</p></section>
{parts}
<footer>dmae-ds {escape(__version__)}</footer></body></html>
"""


def figures(svgs: list[str]) -> str:
    """Charts that stand side by side where there is room."""
    return f'<div class="charts">{"".join(f"<figure>{svg}</figure>" for svg in svgs)}</div>'


def side_by_side(parts: list[tuple[str, str, str]]) -> str:
    """A part for each run: (name, small print, HTML), in the order of the page, so that each gets its colour."""
    blocks = "".join(
        f'<section class="run"><h3>{_dot(place)}{escape(name)}{f"<small>{escape(note)}</small>" if note else ""}</h3>{body}</section>'
        for place, (name, note, body) in enumerate(parts)
    )
    return f'<div class="runs">{blocks}</div>'


def missing(sentence: str) -> str:
    """What stands in the place of something that isn't there."""
    return f'<p class="missing">{escape(sentence)}.</p>'


def _table(names: list[str], columns: list[dict[str, Fact]]) -> str:
    head = "".join(f'<th scope="col">{_dot(place)}{escape(name)}</th>' for place, name in enumerate(names))
    rows = []
    for question in dict.fromkeys(question for column in columns for question in column):
        facts = [column.get(question, Fact("-")) for column in columns]
        cells = "".join(
            f"<td>{escape(fact.text)}{f'<small>{escape(fact.note)}</small>' if fact.note else ''}</td>"
            for fact in facts
        )
        rows.append(f'<tr><th scope="row">{escape(question)}</th>{cells}</tr>')
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _dot(place: int) -> str:
    return f'<i style="background:var(--series-{place % NUM_SERIES})"></i>'
