"""Colours of figures in light and dark mode, empty figures in these colours, and figures as PNG or SVG.

A figure is drawn once, in light colours. In the SVG every colour is replaced by a CSS variable of the page,
so that the browser can choose the dark colour; text stays text.
"""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# CSS variable -> (light, dark). Adjacent colours of the series differ for colour-blind readers too.
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
_PART_NAMES = (
    r' id="[a-zA-Z0-9.]+_[0-9]+"'  # matplotlib's ids, the same in every figure; nothing refers to them
)


def light(variable: str) -> str:
    """The light colour (#rrggbb) of a CSS variable."""
    return COLOURS[variable][0]


def series_colour(place: int) -> str:
    """The light colour of a run, given its place on the page (0, 1, ...)."""
    return light(f"--series-{place % NUM_SERIES}")


def plain_text():
    """Context in which matplotlib doesn't read `$` as mathematics: a run may be called a$b."""
    return matplotlib.rc_context({"text.parse_math": False})


def new_figure(
    title: str, *, width: float, height: float, xlabel: str = "", ylabel: str = ""
) -> tuple[Figure, Axes]:
    """A figure and its axes without frame or ticks. width, height: in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=light("--surface"))
    axes = figure.add_subplot(facecolor=light("--surface"))
    axes.set_title(title, loc="left", fontsize=10, color=light("--ink"), pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=light("--soft"))
    axes.set_ylabel(ylabel, fontsize=9, color=light("--soft"))
    axes.tick_params(labelsize=9, labelcolor=light("--soft"), length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure, axes


def add_legend(figure: Figure, handles: list, labels: list[str], *, columns: int, **options) -> None:
    """Add a legend below the axes."""
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=light("--soft"),
        **options,
    )


def add_key(figure: Figure, colours: list[tuple[str, tuple[str, float]]]) -> None:
    """Add a key below the axes: what each (colour, opacity) means."""
    swatches = [Rectangle((0, 0), 1, 1, facecolor=colour, linewidth=0) for _, colour in colours]
    add_legend(figure, swatches, [name for name, _ in colours], columns=len(colours), handlelength=1.2)


def to_png(figure: Figure) -> bytes:
    """The figure in light colours, with its background."""
    file = io.BytesIO()
    # A higher compression level takes three times as long.
    options = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}}
    figure.savefig(file, format="png", dpi=160, **options)
    figure.set_layout_engine("none")  # the layout is final: an SVG of the figure needn't compute it again
    return file.getvalue()


def to_svg(figure: Figure) -> str:
    """An <svg> element for a page that defines the variables of COLOURS; it loads nothing from elsewhere."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text; the fixed salt gives equal figures equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dmae-ds"}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prolog, which is not allowed in the middle of a page
    svg = re.sub(r"\s*<!--.*?-->", "", svg, flags=re.DOTALL)  # these repeat every text
    svg = re.sub(_PART_NAMES, "", svg)
    svg = re.sub(r' (width|height)="[0-9.]+pt"', "", svg, count=2)  # the page sets the width
    for variable, (colour, _) in COLOURS.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.IGNORECASE)
    return svg
