"""Which curves stand together in which chart, under which name, in which unit."""

from __future__ import annotations

import math
import re

from matplotlib.figure import Figure

from dmae_ds.evaluate.facts import DEAD_RANK, DEAD_SPREAD, block_of
from dmae_ds.evaluate.record import TIMES, RunRecord
from dmae_ds.report.figures import Curve, draw_bars, draw_curves

Charts = dict[str, Figure]  # {file stem: figure}


def draw_losses(records: dict[str, RunRecord]) -> Charts:
    """One chart a loss, then k-NN where it was measured during training, then the shares of distillation."""
    parts = list(dict.fromkeys(column for record in records.values() for column in record.losses))
    if all(len(record.losses) == 2 for record in records.values()):
        parts.remove("loss")  # a total of one part is that part
    charts = {
        file_name(part): draw_curves(f"{part} (training)", _curves(records, part), unit=_unit_of_loss(part))
        for part in parts
    }
    knn = _curves(records, "knn/top1")
    if knn:
        charts["knn"] = draw_curves("k-NN on frozen features", knn, unit="top-1, %", points=True)
    for share in _columns(records, "share/"):
        title = f"distillation's share of the gradient, block {block_of(share)}"
        charts[file_name(share)] = draw_curves(
            title, _curves(records, share), unit="% of the gradient", share=True
        )
    return charts


def draw_health(records: dict[str, RunRecord]) -> Charts:
    """Effective rank and norm of the features, spread of an EMA teacher's targets; {} where no run measured them."""
    charts = {}
    judged = {f"rank/{record.config.objective.judged_by}" for record in records.values()}
    for column, title in (
        ("rank/mean", "effective rank, mean of patches"),
        ("rank/cls", "effective rank, CLS"),
    ):
        curves = _curves(records, column)
        if curves:
            mark = (DEAD_RANK, f"collapsed below {DEAD_RANK:g}") if column in judged else None
            charts[file_name(column)] = draw_curves(
                title, curves, unit="directions", from_zero=True, mark=mark
            )
    spreads = _curves(records, "target/spread")
    if spreads:
        mark = (DEAD_SPREAD, f"collapsed below {DEAD_SPREAD:.1%}")
        charts["target-spread"] = draw_curves(
            "spread of the EMA teacher's targets",
            spreads,
            unit="share of the targets",
            from_zero=True,
            mark=mark,
        )
    deepest = {name: record.named("norm/")[-1] for name, record in records.items() if record.named("norm/")}
    tapped = [
        column
        for column in _columns(records, "norm/")
        if any(column in record.named("norm/")[:-1] for record in records.values())
    ]
    for column in tapped:
        curves = [curve for curve in _curves(records, column) if deepest[curve.name] != column]
        charts[file_name(column)] = draw_curves(
            f"feature norm, distilled block {block_of(column)}", curves, unit="mean L2 norm of a token"
        )
    if deepest:
        curves = [
            curve for name in deepest for curve in _curves(records, deepest[name]) if curve.name == name
        ]
        charts["norm-last"] = draw_curves("feature norm, last block", curves, unit="mean L2 norm of a token")
    return charts


def draw_times(records: dict[str, RunRecord]) -> Charts:
    """Throughput, and what a step's time went into, for the runs that measured it."""
    charts = {
        "images_per_s": draw_curves(
            "throughput", _curves(records, "images_per_s"), unit="images/s", from_zero=True
        )
    }
    bars = [
        (name, place, list(record.seconds().values()))
        for place, (name, record) in enumerate(records.items())
        if record.seconds()
    ]
    if bars:
        charts["seconds"] = draw_bars(
            "a step's time on the host", bars, list(TIMES), unit="seconds, median step"
        )
    return charts


def file_name(name: str) -> str:
    """What stands in for a name in a file's."""
    return re.sub(r"[^\w.-]", "-", name)


def _columns(records: dict[str, RunRecord], prefix: str) -> list[str]:
    return list(dict.fromkeys(column for record in records.values() for column in record.named(prefix)))


def _curves(records: dict[str, RunRecord], column: str) -> list[Curve]:
    """The runs that have a column; a run keeps its place, and with it its colour, in every chart."""
    curves = [
        Curve(name, place, record.epochs(column), record.column(column))
        for place, (name, record) in enumerate(records.items())
    ]
    return [curve for curve in curves if any(math.isfinite(value) for value in curve.values)]


def _unit_of_loss(part: str) -> str:
    return (
        "mean squared error"
        if part == "pixel"
        else "distance to the teacher"
        if part.startswith("align/")
        else "sum of its parts"
    )
