"""One page about one run or several: what they are, how they learned, what they see.

    dmae-ds report RUN [RUN ...] [--out page.html]

The page needs nothing but itself (no script, no request) and follows the reader's light or dark mode. Its figures lie
as PNG in the first run's `figures/`.
"""

from __future__ import annotations

import base64
import io
import re
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dmae_ds import __version__
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.data.shards import replacing
from dmae_ds.errors import UserError
from dmae_ds.evaluate.facts import Fact, block_of, find_dead_terms, list_facts
from dmae_ds.evaluate.reconstruct import choose_pictures, reconstruct
from dmae_ds.evaluate.record import RunRecord, read_record
from dmae_ds.figures import COLOURS, MAX_POINTS, NUM_SERIES, Curve, draw_curves, draw_pictures, to_png, to_svg
from dmae_ds.models.patches import Normalize
from dmae_ds.train.run import build_objective

NUM_PICTURES = 8
PICTURE_SEED = 0  # not the run's: every run of a page shows the same pictures under the same masks


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page (default: report.html in the first run's folder) and its figures; returns the page's path.

    Raises UserError for a folder that is no run, a run without metrics or named twice, or a page that has no folder.
    """
    records = {name: read_record(path) for name, path in zip(name_runs(runs), runs, strict=True)}
    out, figures = out or runs[0] / "report.html", runs[0] / "figures"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder '{out.parent}'; make it, or choose another")
    figures.mkdir(exist_ok=True)
    columns, pictures = [], []
    for name, record in records.items():
        objective, shape = build_objective(record.config)
        columns.append(list_facts(record, objective, shape))
        try:
            triples = _paint(record, objective)
        except UserError as error:  # a run under way, or shards that moved: the rest of the page still stands
            pictures.append(_section_of_pictures(name, [], str(error)))
            continue
        _save(figures / f"pictures-{_file_name(name)}.png", to_png(draw_pictures(f"{name}, {columns[-1]['objective'].note}", triples)))
        pictures.append(_section_of_pictures(name, triples, columns[-1]["objective"].note))
    charts = draw_charts(records)
    for stem, figure in charts.items():
        _save(figures / f"{stem}.png", to_png(figure))
    alarms = [sentence for name, record in records.items() for sentence in find_dead_terms(record, name)]
    page = render_page(list(records), alarms, columns, [to_svg(figure) for figure in charts.values()], pictures)
    _save(out, page.encode())
    return out


def name_runs(runs: list[Path]) -> list[str]:
    """Each run by the end of its path, as short as tells them apart. Raises UserError for one that is named twice."""
    parts = [path.expanduser().resolve().parts for path in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"a run is named twice: {', '.join(map(str, runs))}; name each once")


def draw_charts(records: dict[str, RunRecord]) -> dict[str, Figure]:
    """One chart a loss, then one a distilled block's share of the gradient, with every run that has it: {file stem: figure}."""
    parts = list(dict.fromkeys(column for record in records.values() for column in record.losses))
    if all(len(record.losses) == 2 for record in records.values()):
        parts.remove("loss")  # a total of one part is that part
    shares = list(dict.fromkeys(column for record in records.values() for column in record.shares))
    charts = {}
    for column in parts + shares:
        curves = [
            Curve(name, place, record.column("epoch"), record.column(column))
            for place, (name, record) in enumerate(records.items())
            if column in record.rows[0]
        ]  # fmt: skip
        title = f"distillation's share of the gradient, block {block_of(column)}" if column in shares else f"{column} (training)"
        charts[_file_name(column)] = draw_curves(title, curves, share=column in shares)
    return charts


def _paint(record: RunRecord, objective: nn.Module) -> list[tuple[np.ndarray, ...]]:
    """(original, masked, reconstructed) of some validation pictures, each [H, W, 3] uint8. Raises UserError where something is missing."""
    data = record.config.data
    if data.val is None:
        raise UserError("data.val is null in the run's config.yaml, so there are no pictures to show")
    shard_set = ShardSet.open(data.val, label="data.val", access=Access.of(data))
    objective.load_state_dict(_read_weights(record.path), strict=True)
    student = objective.eval().student
    images, noise = choose_pictures(
        shard_set, num=NUM_PICTURES, seed=PICTURE_SEED, img_size=student.grid[0] * student.patch_size,
        num_patches=student.num_patches, crop_pct=data.crop_pct,
    )  # fmt: skip
    masked, painted = reconstruct(objective, images, noise, Normalize(data.mean, data.std))
    # [N, 3, H, W] -> [N, H, W, 3]
    return list(zip(*(pictures.movedim(1, -1).numpy() for pictures in (images, masked, painted)), strict=True))


def _read_weights(run: Path) -> dict:
    weights = {}
    for name, prefix in (("student", "student."), ("decoder", "")):
        path = run / f"{name}.safetensors"
        try:
            weights |= {prefix + key: tensor for key, tensor in load_file(path).items()}
        except FileNotFoundError:
            raise UserError(f"no {path.name} yet: the run writes it with its first checkpoint") from None
        except SafetensorError as error:
            raise UserError(f"{path.name} is not a whole safetensors file ({error}); copy it again") from None
    return weights


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name)


def _save(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


# ---- the page


def render_page(names: list[str], alarms: list[str], columns: list[dict[str, Fact]], charts: list[str], pictures: list[str]) -> str:
    """The whole page; charts are <svg> elements and pictures <section>s, all else is text to be escaped."""
    title = escape(", ".join(names)) if len(names) < 4 else f"{len(names)} runs"
    warnings = "".join(f'<p class="alarm" role="alert"><b>Dead term.</b> {escape(sentence)}</p>' for sentence in alarms)
    figures = "".join(f"<figure>{svg}</figure>" for svg in charts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title} - dmae-ds report</title><style>{_style()}</style></head>
<body><header><p>dmae-ds report</p><h1>{title}</h1></header>{warnings}
<section><div class="scroll">{_table(names, columns)}</div>
<p class="note">Losses and shares are means over the last tenth of the steps.</p></section>
<section><h2>How they learned</h2><div class="charts">{figures}</div>
<p class="note">Every curve has at most {MAX_POINTS} points; in a longer run each is the mean of its stretch of steps.</p></section>
<section><h2>What they see</h2><p class="note">Validation pictures, the same for every run. Each column from top to bottom: the original, the patches
the student saw, and those together with the patches its decoder painted.</p>{"".join(pictures)}</section>
<footer>dmae-ds {escape(__version__)}</footer></body></html>
"""


def _table(names: list[str], columns: list[dict[str, Fact]]) -> str:
    head = "".join(f'<th scope="col"><i style="background:var(--series-{place % NUM_SERIES})"></i>{escape(name)}</th>' for place, name in enumerate(names))
    rows = []
    for question in dict.fromkeys(question for column in columns for question in column):
        facts = [column.get(question, Fact("-")) for column in columns]
        cells = "".join(f"<td>{escape(fact.text)}{f'<small>{escape(fact.note)}</small>' if fact.note else ''}</td>" for fact in facts)
        rows.append(f'<tr><th scope="row">{escape(question)}</th>{cells}</tr>')
    return f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section_of_pictures(name: str, triples: list[tuple[np.ndarray, ...]], note: str) -> str:
    strips = "".join(f'<img alt="original, masked, reconstructed" src="data:image/png;base64,{_strip(triple)}">' for triple in triples)
    return f'<section class="run"><h3>{escape(name)}</h3><p class="note">{escape(note)}</p><div class="pictures">{strips}</div></section>'


def _strip(triple: tuple[np.ndarray, ...]) -> str:
    """Pictures below one another with a transparent gap, as base64 of a PNG."""
    height, width = triple[0].shape[:2]
    gap = max(1, height // 16)
    strip = Image.new("RGBA", (width, 3 * height + 2 * gap))
    for place, picture in enumerate(triple):
        strip.paste(Image.fromarray(picture), (0, place * (height + gap)))
    file = io.BytesIO()
    strip.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _style() -> str:
    light, dark = ("".join(f"{variable}:{pair[side]};" for variable, pair in COLOURS.items()) for side in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"


_STYLE = """
body{margin:0 auto;max-width:76rem;padding:1.5rem clamp(.9rem,3vw,2.5rem) 3rem;background:var(--surface);color:var(--ink);
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
header p,footer,.note,small{color:var(--soft);font-size:.85rem} header p{margin:0}
h1{margin:0 0 1.2rem;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere} h2{margin:2.5rem 0 .6rem;font-size:1.2rem}
h3{margin:1.4rem 0 0;font-size:1rem;overflow-wrap:anywhere} .note{margin:.2rem 0 .8rem;max-width:60rem}
.alarm{border-left:4px solid var(--alarm);padding:.2rem 0 .2rem .8rem;max-width:60rem} .alarm b{color:var(--alarm)}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.45rem 1.6rem .45rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th[scope=row]{color:var(--soft);font-weight:400;min-width:7rem;max-width:14rem} td{min-width:8rem;max-width:24rem;overflow-wrap:anywhere}
thead th{overflow-wrap:anywhere} th i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
tbody tr:first-child td{font-size:1.7rem;font-weight:600;line-height:1.3} small{display:block;font-weight:400;line-height:1.4}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(25rem,100%),1fr));gap:1.5rem 2.5rem} figure{margin:0}
svg{display:block;width:100%;height:auto} svg text{font-family:inherit!important}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(4.6rem,1fr));gap:1.1rem .6rem;max-width:60rem}
.pictures img{width:100%;image-rendering:pixelated} footer{margin-top:3rem}
@media(max-width:40rem){th,td{padding-right:.7rem} td{min-width:6.6rem} th[scope=row]{min-width:0;width:5.2rem;font-size:.85rem}}
"""
