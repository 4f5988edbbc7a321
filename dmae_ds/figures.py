"""Figures of a report: each a picture for a paper or a chat (PNG) and a part of a page, light or dark (SVG).

A figure is drawn once, in the colours of the light page. In the SVG every colour becomes a CSS variable of the page,
so that the browser can put the dark page's in its place; the text stays text.
"""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dmae_ds.evaluate.facts import DEAD_SHARE

# CSS variable -> (light, dark). The series' order is fixed: neighbours stay apart for colour-blind eyes.
COLOURS = {
    "--surface": ("#fcfcfb", "#1a1a19"),
    "--ink": ("#161615", "#f4f3ee"),
    "--soft": ("#62615c", "#aeada5"),
    "--line": ("#dedcd5", "#3a3936"),
    "--alarm": ("#b3261e", "#ff8a80"),
    "--series-0": ("#2a78d6", "#3987e5"),
    "--series-1": ("#eb6834", "#d95926"),
    "--series-2": ("#1baf7a", "#199e70"),
    "--series-3": ("#eda100", "#c98500"),
    "--series-4": ("#e87ba4", "#d55181"),
    "--series-5": ("#008300", "#2c9a2c"),
    "--series-6": ("#4a3aa7", "#9085e9"),
    "--series-7": ("#e34948", "#e66767"),
}
NUM_SERIES = 8
MAX_POINTS = 300  # a curve of more steps is drawn as means: a pixel of the page holds no more
DASHES = ["-", "--", ":"]  # runs 8 to 15 take the colours again, dashed


@dataclass(frozen=True)
class Curve:
    """One run's scalar over time; `place` (0, 1, ...) gives its colour, the same in every figure."""

    name: str
    place: int
    epochs: list[float]
    values: list[float]


def light(variable: str) -> str:
    return COLOURS[variable][0]


def thin_out(epochs: list[float], values: list[float], max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean epochs and values of equally long stretches of steps (the last may be shorter); returns them and the stretch."""
    stretch = math.ceil(len(values) / max_points)
    starts = np.arange(0, len(values), stretch)
    lengths = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(epochs, starts) / lengths, np.add.reduceat(values, starts) / lengths, stretch


def draw_curves(title: str, curves: list[Curve], *, share: bool = False) -> Figure:
    """Curves of several runs in one axes. share: values are parts of 1, drawn as percent with the mark of a dead term."""
    with matplotlib.rc_context({"text.parse_math": False}):  # a run may be called a$b
        figure = Figure(figsize=(4.3, 2.9), layout="constrained", facecolor=light("--surface"))
        axes = figure.add_subplot(facecolor=light("--surface"))
        axes.set_title(title, loc="left", fontsize=10, color=light("--ink"), pad=8)
        axes.set_xlabel("epoch", fontsize=9, color=light("--soft"))
        axes.tick_params(labelsize=9, labelcolor=light("--soft"), length=0)
        axes.grid(axis="y", color=light("--line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[:].set_visible(False)
        axes.spines["bottom"].set(visible=True, color=light("--line"))
        lines = [_draw(axes, curve) for curve in curves]
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.axhline(DEAD_SHARE, color=light("--alarm"), linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(f"dead term below {DEAD_SHARE:.0%}", (1, DEAD_SHARE), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                          ha="right", va="bottom", fontsize=8.5, color=light("--alarm"))  # fmt: skip
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(curves) > 1:
            figure.legend(lines, [curve.name for curve in curves], loc="outside lower left", ncols=min(3, len(curves)), frameon=False,
                          fontsize=8.5, labelcolor=light("--soft"), handlelength=1.4)  # fmt: skip
    return figure


def _draw(axes, curve: Curve):
    epochs, values, _ = thin_out(curve.epochs, curve.values)
    dash = DASHES[curve.place // NUM_SERIES % len(DASHES)]
    marker = "o" if len(values) == 1 else None  # a line of one point can't be seen
    return axes.plot(epochs, values, color=light(f"--series-{curve.place % NUM_SERIES}"), linewidth=1.6, linestyle=dash, marker=marker)[0]


def draw_pictures(title: str, triples: list[tuple[np.ndarray, ...]]) -> Figure:
    """A column a picture: (original, masked, reconstructed), each [H, W, 3] uint8."""
    height, width = triples[0][0].shape[:2]
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(len(triples) + 1.1, 3.2 * height / width + 0.4), layout="constrained", facecolor=light("--surface"))
        figure.suptitle(title, fontsize=9, color=light("--ink"))
        grid = figure.subplots(3, len(triples), squeeze=False)
        for row, name in enumerate(("original", "masked", "reconstructed")):
            grid[row][0].set_ylabel(name, fontsize=9, color=light("--soft"), rotation=0, ha="right", va="center")
        for column, triple in zip(grid.T, triples, strict=True):
            for axes, picture in zip(column, triple, strict=True):
                axes.imshow(picture, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure in the light page's colours, with its background."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200, metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page that defines the variables of COLOURS; nothing in it is fetched from elsewhere."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dmae-ds"}):  # text as text; equal figures, equal bytes
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which has no place in the middle of a page
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)  # every text once more
    svg = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", svg)  # the parts' names, which nothing refers to and every figure repeats
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page says how wide
    for variable, (colour, _) in COLOURS.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.IGNORECASE)
    return svg
