"""Charts of metrics over training: which curves are in which chart, under which title, in which unit."""

from __future__ import annotations

import math
import re

from matplotlib.figure import Figure

from dmae_ds.evaluate.facts import COLLAPSED_RANK, DEAD_SPREAD, block_of
from dmae_ds.evaluate.record import TIMES, RunRecord
from dmae_ds.report.figures import Curve, draw_bars, draw_curves

Charts = dict[str, Figure]  # {file stem: figure}


def draw_losses(records: dict[str, RunRecord]) -> Charts:
    """Draw charts of each loss, also on data.val, of k-NN during training, and of distillation's shares."""
    losses = list(dict.fromkeys(column for record in records.values() for column in record.losses))
    if all(len(record.losses) == 2 for record in records.values()):
        losses.remove("loss")  # a total of one part is that part
    charts = {
        safe_name(loss): draw_curves(f"{loss} (training)", _curves(records, loss), unit=_unit_of_loss(loss))
        for loss in losses
    }
    for column in _columns(records, "val/"):
        name = column.partition("/")[2]
        if len(_columns(records, "val/")) == 2 and name == "loss":
            continue
        curves = _curves(records, column)
        charts[safe_name(column)] = draw_curves(
            f"{name} on data.val", curves, unit=_unit_of_loss(name), points=True
        )
    knn = _curves(records, "knn/top1")
    if knn:
        charts["knn"] = draw_curves("k-NN on frozen features", knn, unit="top-1, %", points=True)
    for share in _columns(records, "share/"):
        title = f"distillation's share of the gradient, block {block_of(share)}"
        curves = _curves(records, share)
        charts[safe_name(share)] = draw_curves(title, curves, unit="% of the gradient", share=True)
    return charts


def draw_health(records: dict[str, RunRecord]) -> Charts:
    """Draw effective ranks, the spread of an EMA teacher's targets, and feature norms, as far as measured."""
    return {**_draw_ranks(records), **_draw_spread(records), **_draw_norms(records)}


def _draw_ranks(records: dict[str, RunRecord]) -> Charts:
    charts = {}
    judged = {f"rank/{record.config.objective.judged_by}" for record in records.values()}
    titles = {"rank/mean": "effective rank, mean of patches", "rank/cls": "effective rank, CLS"}
    for column, title in titles.items():
        curves = _curves(records, column)
        if curves:
            limit, *others = {COLLAPSED_RANK * record.at_start(column) for record in records.values()}
            is_drawn = column in judged and limit > 0 and not others  # not where runs start differently
            mark = (limit, f"collapsed below {COLLAPSED_RANK:g} of the start") if is_drawn else None
            figure = draw_curves(title, curves, unit="directions", from_zero=True, mark=mark)
            charts[safe_name(column)] = figure
    return charts


def _draw_spread(records: dict[str, RunRecord]) -> Charts:
    curves = _curves(records, "target/spread")
    if not curves:
        return {}
    title, unit = "spread of the EMA teacher's targets", "share of the targets"
    mark = (DEAD_SPREAD, f"collapsed below {DEAD_SPREAD:.1%}")
    return {"target-spread": draw_curves(title, curves, unit=unit, from_zero=True, mark=mark)}


def _draw_norms(records: dict[str, RunRecord]) -> Charts:
    """One chart for each distilled block, and one for the last block of every student."""
    norms = {name: record.named("norm/") for name, record in records.items()}
    last = {name: columns[-1] for name, columns in norms.items() if columns}
    distilled = {column for columns in norms.values() for column in columns[:-1]}
    unit = "mean L2 norm of a token"
    charts = {}
    for column in _columns(records, "norm/"):
        if column in distilled:
            curves = [curve for curve in _curves(records, column) if last[curve.name] != column]
            title = f"feature norm, distilled block {block_of(column)}"
            charts[safe_name(column)] = draw_curves(title, curves, unit=unit)
    if last:
        curves = [
            curve for name, column in last.items() for curve in _curves(records, column) if curve.name == name
        ]
        charts["norm-last"] = draw_curves("feature norm, last block", curves, unit=unit)
    return charts


def draw_times(records: dict[str, RunRecord]) -> Charts:
    """Draw the throughput, and for runs that measured it the parts of a step's time."""
    throughput = _curves(records, "images_per_s")
    charts = {
        "images_per_s": draw_curves("throughput", throughput, unit="images/s", from_zero=True),
    }
    seconds = {name: record.seconds() for name, record in records.items()}
    bars = [
        (name, place, list(seconds[name].values())) for place, name in enumerate(records) if seconds[name]
    ]
    if bars:
        title, unit = "a step's time on the host", "seconds, median step"
        charts["seconds"] = draw_bars(title, bars, list(TIMES), unit=unit)
    return charts


def safe_name(name: str) -> str:
    """A name with characters that are safe in a file's name."""
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


def _unit_of_loss(loss: str) -> str:
    if loss == "pixel":
        return "mean squared error"
    return "distance to the teacher" if loss.startswith("align/") else "sum of its parts"
