"""The plot of the study: every number of every setting, with mean and deviation over its seeds."""

from __future__ import annotations

import math
import textwrap
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmae_ds.evaluate.results import headline_score
from dmae_ds.output.theme import light, plain_text
from dmae_ds.report.study import TEACHER, Column, Setting

PANELS_A_ROW = 3


def draw_study(settings: list[Setting], headings: dict[Column, str]) -> Figure:
    """Draw one panel a column, with one row for each setting that has a number in that row of panels.

    Each seed is a ring, their mean a stroke with an error bar of one sample standard deviation.
    """
    num_rows = math.ceil(len(headings) / PANELS_A_ROW)
    num_columns = math.ceil(len(headings) / num_rows)
    columns = list(headings)
    rows = [columns[row * num_columns : (row + 1) * num_columns] for row in range(num_rows)]
    shown = [[setting for setting in settings if not setting.values.keys().isdisjoint(row)] for row in rows]
    heights = [0.9 + 0.36 * len(settings_of_row) for settings_of_row in shown]
    with plain_text():
        figure = Figure(
            figsize=(2.6 + 2.2 * num_columns, sum(heights)),
            layout="constrained",
            facecolor=light("--surface"),
        )
        panels = figure.subplots(num_rows, num_columns, sharey="row", squeeze=False, height_ratios=heights)
        for axes in panels[-1, len(rows[-1]) :]:
            axes.set_visible(False)
        for panels_of_row, row, settings_of_row in zip(panels, rows, shown, strict=True):
            for axes, column in zip(panels_of_row, row, strict=False):
                _draw_panel(axes, settings_of_row, column, heading=headings[column])
    return figure


def _draw_panel(axes: Axes, settings: list[Setting], column: Column, *, heading: str) -> None:
    axes.set_facecolor(light("--surface"))
    axes.set_title(textwrap.fill(heading, 26), loc="left", fontsize=9, color=light("--ink"))
    for height, setting in enumerate(settings):
        if column in setting.values:
            _draw_setting(axes, height, setting.values[column], colour=colour_of(setting))
    axes.set_yticks(range(len(settings)), [textwrap.fill(setting.name, 36) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8, labelcolor=light("--soft"), length=0)
    axes.grid(axis="x", color=light("--line"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    score = headline_score(column.metric)
    axes.set_xlabel(f"{score.title}, {score.unit}", fontsize=8, color=light("--soft"))


def colour_of(setting: Setting) -> str:
    """Grey for teachers of other runs, one colour for students of a frozen teacher and one for all others."""
    if setting.name.startswith(TEACHER):
        return light("--soft")
    distilled = any(run.facts["distilled"] for run in setting.runs)
    return light("--series-0" if distilled else "--series-1")


def _draw_setting(axes: Axes, height: int, values: list[float], *, colour: str) -> None:
    deviation = stdev(values) if len(values) > 1 else None
    mean = {"fmt": "|", "markersize": 9, "color": colour, "linewidth": 1.4}
    axes.errorbar(fmean(values), height, xerr=deviation, **mean)
    ring = {"markersize": 4, "markerfacecolor": "none", "markeredgecolor": colour, "alpha": 0.7}
    axes.plot(values, [height] * len(values), "o", **ring)
