"""The HTML of the page: alarms, a table of facts, and sections that each begin with how to read them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from dmae_ds import __version__
from dmae_ds.evaluate.facts import Fact
from dmae_ds.output.theme import COLOURS, NUM_SERIES

TITLE_END = " - dmae-ds report</title>"  # by which a page is known


@dataclass(frozen=True)
class Section:
    """A heading, a note on how to read what follows, and the body as HTML."""

    title: str
    note: str
    body: str


def render_page(
    names: list[str],
    alarms: list[tuple[str, str]],
    columns: list[dict[str, Fact]],
    sections: list[Section],
    differing: dict[str, list[str]],
) -> str:
    """Render the whole page.

    alarms: (kind, sentence); columns: the facts of each run, in the order of names
    differing: values of each run by the keys in which they differ; these stand first
    Bodies of sections are HTML, all other text is escaped here.
    """
    title = escape(", ".join(names)) if len(names) < 4 else f"{len(names)} runs"
    warnings = "".join(
        f'<p class="alarm" role="alert"><b>{escape(kind)}.</b> {escape(sentence)}</p>'
        for kind, sentence in alarms
    )
    bodies = "".join(
        f"<section><h2>{escape(section.title)}</h2>"
        f'<p class="note">{escape(section.note)}</p>{section.body}</section>'
        for section in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}{TITLE_END}
<style>{style()}</style></head>
<body><header><p>dmae-ds report</p><h1>{title}</h1></header>{warnings}
{_differences(names, differing)}<section><div class="scroll">{_table(names, columns)}</div>
<p class="note">Losses, shares and ranks are means over the last tenth of the steps that have them.</p>
</section>
{bodies}
<footer>dmae-ds {escape(__version__)}</footer></body></html>
"""


def place_charts(svgs: list[str]) -> str:
    """Charts side by side, as many as fit."""
    return f'<div class="charts">{"".join(f"<figure>{svg}</figure>" for svg in svgs)}</div>'


def place_runs(runs: list[tuple[str, str, str]]) -> str:
    """One block for each run, (name, small print, HTML), in the order of the page, which gives the colour."""
    blocks = []
    for place, (name, note, body) in enumerate(runs):
        small = f"<small>{escape(note)}</small>" if note else ""
        blocks.append(f'<section class="run"><h3>{_dot(place)}{escape(name)}{small}</h3>{body}</section>')
    return f'<div class="runs">{"".join(blocks)}</div>'


def missing(sentence: str) -> str:
    """A sentence in the place of something that is missing."""
    return f'<p class="missing">{escape(sentence)}.</p>'


def _table(names: list[str], columns: list[dict[str, Fact]]) -> str:
    heads = [f'<th scope="col">{_dot(place)}{escape(name)}</th>' for place, name in enumerate(names)]
    rows = []
    for question in dict.fromkeys(question for column in columns for question in column):
        cells = [_cell(column.get(question, Fact("-"))) for column in columns]
        rows.append(f'<tr><th scope="row">{escape(question)}</th>{"".join(cells)}</tr>')
    head = f"<thead><tr><td></td>{''.join(heads)}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _differences(names: list[str], differing: dict[str, list[str]]) -> str:
    """A table of the keys in which the runs differ; nothing for one run or equal ones."""
    if not differing:
        return ""
    heads = "".join(f'<th scope="col">{_dot(place)}{escape(name)}</th>' for place, name in enumerate(names))
    rows = []
    for key, values in differing.items():
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>')
    return (
        f'<section><h2>Keys that differ</h2><div class="scroll"><table class="keys">'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )


def _cell(fact: Fact) -> str:
    small = f"<small>{escape(fact.note)}</small>" if fact.note else ""
    return f"<td>{escape(fact.text)}{small}</td>"


def _dot(place: int) -> str:
    return f'<i style="background:var(--series-{place % NUM_SERIES})"></i>'


def style() -> str:
    """The page's CSS."""
    light = "".join(f"{variable}:{colours[0]};" for variable, colours in COLOURS.items())
    dark = "".join(f"{variable}:{colours[1]};" for variable, colours in COLOURS.items())
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"


_STYLE = """
body{margin:0 auto;max-width:76rem;padding:1.5rem clamp(.9rem,3vw,2.5rem) 3rem;
 background:var(--surface);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header p,footer,.note,small{color:var(--soft);font-size:.85rem} header p{margin:0}
h1{margin:0 0 1.2rem;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}
h2{margin:3rem 0 .2rem;font-size:1.25rem}
h3{margin:0 0 .5rem;font-size:1rem;overflow-wrap:anywhere}
h3 small{display:inline;font-weight:400;margin-left:.6em}
i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.note{margin:.2rem 0 1rem;max-width:60rem} .missing{margin:.2rem 0;color:var(--soft)}
.alarm{border-left:4px solid var(--alarm);padding:.2rem 0 .2rem .8rem;max-width:60rem;
 overflow-wrap:anywhere} .alarm b{color:var(--alarm)}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem 1.6rem .45rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th[scope=row]{color:var(--soft);font-weight:400;min-width:7rem;max-width:14rem}
td{min-width:8rem;max-width:24rem;overflow-wrap:anywhere}
thead th{overflow-wrap:anywhere}
tbody tr:first-child td{font-size:1.7rem;font-weight:600;line-height:1.3}
.keys tbody tr td{font-size:1rem;font-weight:400}
small{display:block;font-weight:400;line-height:1.4}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1.5rem 2.5rem}
figure{margin:0}
svg{display:block;width:100%;height:auto} svg text{font-family:inherit!important}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(29rem,100%),1fr));gap:2rem 3rem}
.run{min-width:0;max-width:44rem} .run .charts{grid-template-columns:1fr}
.board{display:grid;grid-template-columns:5.4rem repeat(var(--columns),minmax(0,1fr));gap:.35rem;
 align-items:center;max-width:44rem}
.board span{color:var(--soft);font-size:.85rem;line-height:1.2}
.board b{font-weight:400;font-size:.8rem;line-height:1.2;color:var(--soft);align-self:end}
.board img{width:100%;aspect-ratio:1;image-rendering:pixelated} footer{margin-top:3rem}
@media(max-width:40rem){th,td{padding-right:.7rem} td{min-width:6.6rem}
 th[scope=row]{min-width:0;width:5.2rem;font-size:.85rem}
 tbody tr:first-child td{font-size:1.2rem} .keys tbody tr td{font-size:.9rem}
 .board{grid-template-columns:repeat(var(--columns),minmax(0,1fr))}
 .board span{grid-column:1/-1;margin-top:.4rem} .board span:empty{display:none}}
"""
