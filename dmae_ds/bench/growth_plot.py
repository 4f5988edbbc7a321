"""The plot of `bench growth`: time, counted work and memory of a step as multiples of the recipe's own."""

from __future__ import annotations

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmae_ds.output.theme import add_legend, light, plain_text, series_colour

# Number of a point -> (its name, the colour's place, the line).
SERIES = {
    "gflop_ratio": ("counted FLOPs", 3, "--"),
    "seconds_ratio": ("time (bars: all rounds)", 0, "-"),
    "peak_ratio": ("peak memory", 1, "-"),
}
WIDTH = 2.0  # inches of a panel


def draw_growth(results: dict) -> Figure:
    """Draw one panel an axis, from zero; the dotted lines meet at the recipe's own point."""
    axes = results["axes"]
    width = 0.6 + WIDTH * max(2, len(axes))
    with plain_text():
        figure = Figure(figsize=(width, 3.0), layout="constrained", facecolor=light("--surface"))
        panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
        for panel, axis in zip(panels, axes, strict=True):
            _draw_panel(panel, axis)
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("multiple of the recipe's step", fontsize=9, color=light("--soft"))
        add_legend(figure, *panels[0].get_legend_handles_labels(), columns=len(SERIES))
        title = f"{results['recipe']}; {results['device']}, {results['threads']} threads"
        figure.suptitle(
            textwrap.fill(title, int(width * 16)), x=0.01, ha="left", fontsize=7, color=light("--soft")
        )
    return figure


def _draw_panel(panel: Axes, axis: dict) -> None:
    panel.set_facecolor(light("--surface"))
    points = axis["points"]
    values = [point["value"] for point in points]
    title, labels = axis["axis"], [f"{value:g}" for value in values]
    if axis["option"] == "--depths":
        title = f"{title} (blocks that run)"
        labels = [
            f"{value}\n({point['teacher_blocks']})" for value, point in zip(values, points, strict=True)
        ]
    panel.set_title(title, loc="left", fontsize=9, color=light("--ink"))
    for key, (name, place, line) in SERIES.items():
        ratios = [point[key] for point in points]
        if None not in ratios:
            style = {"color": series_colour(place), "marker": "o", "markersize": 4, "linewidth": 1.6}
            panel.plot(values, ratios, line, label=name, **style)
    for value, point in zip(values, points, strict=True):
        panel.vlines(value, *point["seconds_ratio_range"], color=series_colour(0), linewidth=3, alpha=0.3)
    lines = {"color": light("--soft"), "linewidth": 0.8, "linestyle": ":", "zorder": 0}
    panel.axhline(1, **lines)
    panel.axvline(axis["own"], **lines)
    panel.set_xticks(values, labels)
    panel.margins(x=0.08)
    panel.tick_params(labelsize=8, labelcolor=light("--soft"), length=0)
    panel.grid(axis="y", color=light("--line"), linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
