"""Figures of a report: curves, bars, heat maps and mosaics of images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dmae_ds.evaluate.facts import DEAD_SHARE
from dmae_ds.output.theme import NUM_SERIES, add_key, add_legend, light, new_figure, plain_text, series_colour

MAX_POINTS = 300  # a longer curve is drawn as means: the page has no more pixels for it
MAX_OPACITY = 0.85  # of a heat map's cell of value 1: the number in it can be read in light and dark mode
DASHES = ["-", "--", ":"]  # runs 8 to 15 use the colours again, dashed
WIDTH = 4.3  # inches
MAX_NUMBERED_GRID = (8, 12)  # rows and columns up to which the cells of a heat map carry their values
MAX_TICKS = 12  # of a heat map's axis; a longer one has a tick at every fourth block


@dataclass(frozen=True)
class Curve:
    """One run's scalar over time; `place` (0, 1, ...) gives its colour, the same in every figure."""

    name: str
    place: int
    epochs: list[float]
    values: list[float]


def thin_out(
    epochs: list[float], values: list[float], max_points: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, int]:
    """Average a curve over equally long groups of steps, so that at most `max_points` remain.

    The last group may be shorter. Returns the mean epochs, the mean values and the length of a group.
    """
    length = math.ceil(len(values) / max_points)
    starts = np.arange(0, len(values), length)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(epochs, starts) / counts, np.add.reduceat(values, starts) / counts, length


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
    """Draw curves of several runs in one axes.

    unit: the label of the y axis; share: the values are parts of 1, drawn in percent, with the limit of a
    dead term
    points: mark every value, for curves of few; from_zero: start the y axis at zero
    mark: (value, meaning) of a horizontal line
    """
    with plain_text():
        figure, axes = new_figure(title, width=WIDTH, height=2.9, xlabel="epoch", ylabel=unit)
        axes.grid(axis="y", color=light("--line"), linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines["bottom"].set(visible=True, color=light("--line"))
        lines = [_draw_curve(axes, curve, points=points) for curve in curves]
        if share:
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=""))
            mark = (DEAD_SHARE, f"a dead term is below {DEAD_SHARE:.0%}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if mark is not None:
            _draw_mark(axes, *mark)
        if from_zero:
            axes.set_ylim(bottom=0)  # after the mark, so that the mark is inside the axes too
        if len(curves) > 1:
            names = [curve.name for curve in curves]
            add_legend(figure, lines, names, columns=min(3, len(curves)), handlelength=1.4)
    return figure


def _draw_curve(axes: Axes, curve: Curve, *, points: bool) -> Line2D:
    epochs, values, _ = thin_out(curve.epochs, curve.values)
    (line,) = axes.plot(
        epochs,
        values,
        color=series_colour(curve.place),
        linewidth=1.6,
        linestyle=DASHES[curve.place // NUM_SERIES % len(DASHES)],
        marker="o" if points or len(values) == 1 else None,  # a line of one point can't be seen
        markersize=4,
    )
    return line


def _draw_mark(axes: Axes, value: float, meaning: str) -> None:
    axes.axhline(value, color=light("--alarm"), linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        meaning,
        (1, value),
        (0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=light("--alarm"),
    )


def draw_grid(
    title: str, values: np.ndarray, *, rows: str, columns: str, marked: list[tuple[int, int]]
) -> Figure:
    """Draw values in 0 to 1, [R, C], as a heat map with the first row at the bottom.

    rows, columns: the labels of the axes; marked: (row, column) pairs, counted from 1, that get a frame
    All cells have one hue, and a cell is as opaque as its value is large: this can be read in light and dark
    mode. Up to 8 x 12 cells carry their numbers, a larger grid has a key.
    """
    num_rows, num_columns = values.shape
    max_rows, max_columns = MAX_NUMBERED_GRID
    numbered = num_rows <= max_rows and num_columns <= max_columns
    height = min(4.3, 1.3 + 2.9 * max(0.35, num_rows / num_columns))
    with plain_text():
        figure, axes = new_figure(title, width=WIDTH, height=height, xlabel=columns, ylabel=rows)
        for (row, column), value in np.ndenumerate(values.clip(0, 1)):
            _draw_cell(axes, row + 1, column + 1, facecolor=_shade(float(value)), linewidth=0)
            if numbered:
                options = {"ha": "center", "va": "center", "fontsize": 8, "color": light("--ink")}
                axes.text(column + 1, row + 1, _short(value), **options)
        for row, column in marked:
            _draw_cell(axes, row, column, fill=False, edgecolor=light("--ink"), linewidth=1.6)
        axes.set(xlim=(0.5, num_columns + 0.5), ylim=(0.5, num_rows + 0.5))
        for axis, num in ((axes.xaxis, num_columns), (axes.yaxis, num_rows)):
            axis.set_ticks(range(1, num + 1) if num <= MAX_TICKS else [1, *range(4, num + 1, 4)])
        if not numbered:
            add_key(figure, [(_short(value), _shade(value)) for value in (0, 0.25, 0.5, 0.75, 1)])
    return figure


def _draw_cell(axes: Axes, row: int, column: int, **options) -> None:
    axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, **options))


def _shade(value: float) -> tuple[str, float]:
    return light("--series-0"), MAX_OPACITY * value


def _short(value: float) -> str:
    """A value in 0 to 1 as .93, 1 or 0."""
    if value >= 0.995:
        return "1"
    return "0" if value < 0.005 else f"{value:.2f}"[1:]


def draw_bars(title: str, bars: list[tuple[str, int, list[float]]], parts: list[str], *, unit: str) -> Figure:
    """Draw one horizontal bar a run in the run's colour, divided into parts that become fainter.

    bars: (name of the run, its place on the page, one value for each part)
    """
    opacities = np.linspace(1, 0.25, len(parts))
    longest = max(sum(values) for _, _, values in bars)
    with plain_text():
        figure, axes = new_figure(title, width=WIDTH, height=1.2 + 0.42 * len(bars), xlabel=unit)
        axes.grid(axis="x", color=light("--line"), linewidth=0.8)
        for height, (_, place, values) in enumerate(bars):
            starts = np.cumsum([0, *values[:-1]])
            for start, value, opacity in zip(starts, values, opacities, strict=True):
                colour = (series_colour(place), opacity)
                axes.add_patch(Rectangle((start, height - 0.3), value, 0.6, facecolor=colour, linewidth=0))
        axes.set(xlim=(0, 1.05 * longest or 1), ylim=(len(bars) - 0.5, -0.5))
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        shades = [(light("--soft"), opacity) for opacity in opacities]
        add_key(figure, list(zip(parts, shades, strict=True)))
    return figure


def draw_mosaic(title: str, mosaic: np.ndarray, labels: list[str], heads: list[str]) -> Figure:
    """Draw one [H, W, 3] uint8 image that consists of equally high rows and of columns.

    labels: one for each row, at its left; heads: one for each column, above it, or none
    """
    height, width = mosaic.shape[:2]
    size = {"width": 6.6 + 0.085 * max(map(len, labels)), "height": 0.7 + 6.5 * height / width}
    with plain_text():
        figure, axes = new_figure(title, **size)
        axes.imshow(mosaic, interpolation="nearest")
        axes.set_yticks([(row + 0.5) * height / len(labels) for row in range(len(labels))], labels)
        axes.set_xticks([(column + 0.5) * width / len(heads) for column in range(len(heads))], heads)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", length=0)
    return figure
