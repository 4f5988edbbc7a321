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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
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
OPAQUE = 0.85  # of a heat map's 1: a number can be read on it, on either page
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


def thin_out(
    epochs: list[float], values: list[float], max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean epochs and values of equally long stretches of steps (the last may be shorter); returns them and the stretch."""
    stretch = math.ceil(len(values) / max_points)
    starts = np.arange(0, len(values), stretch)
    lengths = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(epochs, starts) / lengths, np.add.reduceat(values, starts) / lengths, stretch


def draw_curves(
    title: str,
    curves: list[Curve],
    *,
    unit: str,
    share: bool = False,
    points: bool = False,
    from_zero: bool = False,
    mark: tuple[float, str] | None = None,
) -> Figure:
    """Curves of several runs in one axes.

    unit: of the values, along the axis; share: values are parts of 1, drawn as percent with the mark of a dead term
    points: few values that were measured apart, each of which is marked; from_zero: the axis begins at zero
    mark: (value, what it means) of a line across
    """
    with _plain_text():
        figure, axes = _figure(title, width=4.3, height=2.9)
        axes.set_xlabel("epoch", fontsize=9, color=light("--soft"))
        axes.set_ylabel(unit, fontsize=9, color=light("--soft"))
        axes.grid(axis="y", color=light("--line"), linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines["bottom"].set(visible=True, color=light("--line"))
        lines = [_draw(axes, curve, points=points) for curve in curves]
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
            mark = (DEAD_SHARE, f"dead term below {DEAD_SHARE:.0%}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if mark is not None:
            axes.axhline(mark[0], color=light("--alarm"), linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                mark[1],
                (1, mark[0]),
                (0, 3),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color=light("--alarm"),
            )
        if from_zero:
            axes.set_ylim(bottom=0)  # after the mark, which is to be seen as well
        if len(curves) > 1:
            figure.legend(
                lines,
                [curve.name for curve in curves],
                loc="outside lower left",
                ncols=min(3, len(curves)),
                frameon=False,
                fontsize=8.5,
                labelcolor=light("--soft"),
                handlelength=1.4,
            )
    return figure


def draw_grid(
    title: str, values: np.ndarray, *, rows: str, columns: str, marked: list[tuple[int, int]]
) -> Figure:
    """A heat map of values in 0 to 1, [R, C], the first row at the bottom; rows and columns are counted from 1.

    rows, columns: what they are; marked: (row, column) pairs, from 1, that get a frame. The colour of a cell is one hue, as
    opaque as the value is large, so that it reads on a light and on a dark page; up to 8 x 12 cells carry their number, more a key.
    """
    num_rows, num_columns = values.shape
    numbered = num_rows <= 8 and num_columns <= 12
    with _plain_text():
        figure, axes = _figure(
            title, width=4.3, height=min(4.3, 1.3 + 2.9 * max(0.35, num_rows / num_columns))
        )
        axes.set_xlabel(columns, fontsize=9, color=light("--soft"))
        axes.set_ylabel(rows, fontsize=9, color=light("--soft"))
        for (row, column), value in np.ndenumerate(values.clip(0, 1)):
            axes.add_patch(
                Rectangle(
                    (column + 0.52, row + 0.52),
                    0.96,
                    0.96,
                    facecolor=(light("--series-0"), OPAQUE * float(value)),
                    linewidth=0,
                )
            )
            if numbered:
                axes.text(
                    column + 1,
                    row + 1,
                    _short(value),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=light("--ink"),
                )
        for row, column in marked:
            axes.add_patch(
                Rectangle(
                    (column - 0.48, row - 0.48),
                    0.96,
                    0.96,
                    fill=False,
                    edgecolor=light("--ink"),
                    linewidth=1.6,
                )
            )
        axes.set(xlim=(0.5, num_columns + 0.5), ylim=(0.5, num_rows + 0.5))
        for axis, num in ((axes.xaxis, num_columns), (axes.yaxis, num_rows)):
            axis.set_ticks(range(1, num + 1) if num <= 12 else [1, *range(4, num + 1, 4)])
        if not numbered:
            _add_key(
                figure,
                [(_short(value), (light("--series-0"), OPAQUE * value)) for value in (0, 0.25, 0.5, 0.75, 1)],
            )
    return figure


def draw_bars(title: str, bars: list[tuple[str, int, list[float]]], parts: list[str], *, unit: str) -> Figure:
    """One bar a run, (name, place, a value for each part), cut into its parts: the run's colour, each part fainter than the one before."""
    faintness = np.linspace(1, 0.25, len(parts))
    with _plain_text():
        figure, axes = _figure(title, width=4.3, height=1.2 + 0.42 * len(bars))
        axes.set_xlabel(unit, fontsize=9, color=light("--soft"))
        axes.grid(axis="x", color=light("--line"), linewidth=0.8)
        for height, (_, place, values) in enumerate(bars):
            for start, value, alpha in zip(np.cumsum([0, *values]), values, faintness):
                axes.add_patch(
                    Rectangle(
                        (start, height - 0.3),
                        value,
                        0.6,
                        facecolor=(light(f"--series-{place % NUM_SERIES}"), alpha),
                        linewidth=0,
                    )
                )
        axes.set(
            xlim=(0, 1.05 * max(sum(values) for _, _, values in bars) or 1), ylim=(len(bars) - 0.5, -0.5)
        )
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        _add_key(
            figure, [(part, (light("--soft"), alpha)) for part, alpha in zip(parts, faintness, strict=True)]
        )
    return figure


def draw_mosaic(title: str, mosaic: np.ndarray, labels: list[str], heads: list[str]) -> Figure:
    """One [H, W, 3] uint8 picture of equally high rows, with a label beside each, and of columns, with heads above (or none)."""
    height, width = mosaic.shape[:2]
    with _plain_text():
        figure, axes = _figure(
            title, width=6.6 + 0.085 * max(map(len, labels)), height=0.7 + 6.5 * height / width
        )
        axes.imshow(mosaic, interpolation="nearest")
        axes.set_yticks([(row + 0.5) * height / len(labels) for row in range(len(labels))], labels)
        axes.set_xticks([(column + 0.5) * width / len(heads) for column in range(len(heads))], heads)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", length=0)
    return figure


def _add_key(figure: Figure, colours: list[tuple[str, tuple[str, float]]]) -> None:
    """What the opaqueness of a colour means, under the axes."""
    swatches = [Rectangle((0, 0), 1, 1, facecolor=colour, linewidth=0) for _, colour in colours]
    figure.legend(
        swatches,
        [name for name, _ in colours],
        loc="outside lower left",
        ncols=len(colours),
        frameon=False,
        fontsize=8.5,
        labelcolor=light("--soft"),
        handlelength=1.2,
    )


def _short(value: float) -> str:
    """.93, 1 or 0, of a value that is about in 0 to 1."""
    return "1" if value >= 0.995 else "0" if value < 0.005 else f"{value:.2f}"[1:]


def _plain_text():
    return matplotlib.rc_context({"text.parse_math": False})  # a run may be called a$b


def _figure(title: str, *, width: float, height: float) -> tuple[Figure, Axes]:
    """A figure, in inches, and its axes without frame or ticks."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=light("--surface"))
    axes = figure.add_subplot(facecolor=light("--surface"))
    axes.set_title(title, loc="left", fontsize=10, color=light("--ink"), pad=8)
    axes.tick_params(labelsize=9, labelcolor=light("--soft"), length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure, axes


def _draw(axes: Axes, curve: Curve, *, points: bool) -> Line2D:
    epochs, values, _ = thin_out(curve.epochs, curve.values)
    dash = DASHES[curve.place // NUM_SERIES % len(DASHES)]
    marker = "o" if points or len(values) == 1 else None  # a line of one point can't be seen
    return axes.plot(
        epochs,
        values,
        color=light(f"--series-{curve.place % NUM_SERIES}"),
        linewidth=1.6,
        linestyle=dash,
        marker=marker,
        markersize=4,
    )[0]


def to_png(figure: Figure) -> bytes:
    """The figure in the light page's colours, with its background."""
    file = io.BytesIO()
    figure.savefig(
        file, format="png", dpi=160, metadata={"Software": None}, pil_kwargs={"compress_level": 3}
    )  # smaller takes three times as long
    figure.set_layout_engine("none")  # it stands: an SVG of it needn't be laid out again
    return file.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page that defines the variables of COLOURS; nothing in it is fetched from elsewhere."""
    file = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "dmae-ds"}
    ):  # text as text; equal figures, equal bytes
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which has no place in the middle of a page
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)  # every text once more
    svg = re.sub(
        r' id="[a-zA-Z0-9.]+_[0-9]+"', "", svg
    )  # the parts' names, which nothing refers to and every figure repeats
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page says how wide
    for variable, (colour, _) in COLOURS.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.IGNORECASE)
    return svg
