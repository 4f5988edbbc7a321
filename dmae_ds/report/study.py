"""Runs that differ in nothing but the seed, as one line: mean and deviation of every number that was measured."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmae_ds.config.load import flatten, read_saved_config
from dmae_ds.config.run import RunConfig, StudentConfig, TeacherConfig
from dmae_ds.report.figures import light
from dmae_ds.report.runs import Run

# Sections and keys that don't define what was trained.
_ANY_VALUE = {
    "run",
    "log",
    "checkpoint",
    "data.num_workers",
    "data.cache_dir",
    "data.cache_gib",
    "data.retries",
    "data.timeout_s",
    "data.val",
    "teacher.stats",
}
_METRICS = {
    "knn": "k-NN",
    "probe": "logistic probe",
    "linear": "linear probe",
    "finetune": "fine-tuned",
    "supervised": "supervised",
}
_LABELS = ("all", "10%", "1%")
PANELS_A_ROW = 3
NOT_WATCHED = "not watched"


@dataclass(frozen=True)
class Column:
    """One kind of number. settings: its defining ones, as JSON."""

    metric: str
    labels: str
    settings: str


@dataclass(frozen=True)
class Setting:
    """Runs alike but for their seed. values: of each column, one number a seed that has it, in the order of the seeds."""

    name: str
    runs: list[Run]
    values: dict[Column, list[float]]

    @property
    def seeds(self) -> list[int]:
        return [run.config.run.seed for run in self.runs]


def group(runs: list[Run]) -> list[Setting]:
    """The settings: by objective, the commonest recipe before those that differ from it, and teachers of other runs last."""
    taught_by = {
        folder.resolve() for run in runs for folder in [_run_behind(run.config.teacher)] if folder is not None
    }
    flats: dict[tuple[str, str], dict] = {}
    members: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        flat = identity(run.config)
        key = ("teacher: " if run.path.resolve() in taught_by else "", json.dumps(flat, sort_keys=True))
        flats[key] = flat
        members.setdefault(key, []).append(run)
    defaults = {}
    for run in runs:
        objective = run.config.objective
        defaults[objective.name] = flatten(
            {"objective": type(objective)(name=objective.name).model_dump(mode="json")}
        )
    names = {}
    for role in {role for role, _ in flats}:
        names |= {
            key: role + name
            for key, name in name_settings(
                {key: flat for key, flat in flats.items() if key[0] == role}, defaults
            ).items()
        }
    settings = {key: Setting(names[key], alike, _values(alike)) for key, alike in members.items()}
    return [
        settings[key]
        for key in sorted(
            settings,
            key=lambda key: (key[0], flats[key]["objective.name"], names[key].count(","), names[key]),
        )
    ]


def identity(config: RunConfig) -> dict[str, object]:
    """The config without seed and place, flat: {"optim.epochs": 20.0}. Weights that a run of this project made stand for it, not for their path."""
    flat = {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if key not in _ANY_VALUE and key.split(".")[0] not in _ANY_VALUE
    }
    for name, model in (("teacher", config.teacher), ("student", config.student)):
        folder = _run_behind(model)
        if folder is not None:  # each seed may have trained its own
            flat[f"{name}.weights"] = identity(read_saved_config(folder)) | (
                {} if _is_student_of(folder, model) else {"evaluation": Path(model.weights).parent.name}
            )
    return flat


def _run_behind(model: StudentConfig | TeacherConfig | None) -> Path | None:
    """The folder of the run whose student, or an evaluation's classifier, a network has its weights from, where it is one of this project's."""
    if model is None or model.weights is None:
        return None
    path = Path(model.weights).expanduser()
    folders = (path, path.parent, path.parent.parent)
    return next(
        (
            folder
            for folder in folders
            if (folder / "config.yaml").is_file() and (folder / "student.safetensors").is_file()
        ),
        None,
    )


def _is_student_of(folder: Path, model: StudentConfig | TeacherConfig) -> bool:
    return Path(model.weights).expanduser() in (folder, folder / "student.safetensors")


def name_settings(flats: dict, defaults: dict[str, dict]) -> dict:
    """{key: flat config} -> {key: name}: the objective, then the sections that not all of that objective's settings have, and all in which it differs from the commonest value of those that have it.

    defaults: of each objective, flat; of equally common values, they are the one to differ from
    """
    objectives = {key: flat["objective.name"] for key, flat in flats.items()}
    sections = {
        key: {field.rpartition(".")[0] for field in flat} for key, flat in flats.items()
    }  # optim.epochs stands in "optim"
    names = {}
    for key, flat in flats.items():
        alike = [other for other, objective in objectives.items() if objective == objectives[key]]
        differing = [
            f"with {section.removeprefix('objective.')}"
            for section in sorted(sections[key])
            if not all(section in sections[other] for other in alike)
        ]
        for field, value in flat.items():
            holders = [other for other in alike if field.rpartition(".")[0] in sections[other]]
            counts = Counter(json.dumps(flats[other].get(field), sort_keys=True) for other in holders)
            usual = json.dumps(defaults[objectives[key]].get(field), sort_keys=True)
            commonest = max(counts, key=lambda text: (counts[text], text == usual, text))
            if json.dumps(value, sort_keys=True) != commonest:
                said = (
                    value["objective.name"]
                    if field == "student.weights" and isinstance(value, dict)
                    else "another"
                    if isinstance(value, dict)
                    else "3/4"
                    if field == "objective.pairs" and value is None
                    else json.dumps(value).strip('"')
                )
                differing.append(f"{field.removeprefix('objective.')} {said}")
        names[key] = ", ".join([objectives[key], *differing])
    return names


def columns_of(settings: list[Setting]) -> dict[Column, str]:
    """Every column that some setting has, with its heading, by metric and from many labels to few."""
    found = list(dict.fromkeys(column for setting in settings for column in setting.values))
    order = {name: place for place, name in enumerate((*_METRICS, *_LABELS))}
    found.sort(
        key=lambda column: (
            order[column.metric],
            order.get(column.labels, len(order)),
            column.labels,
            column.settings,
        )
    )
    headings = {}
    for column in found:
        alike = [
            json.loads(other.settings)
            for other in found
            if (other.metric, other.labels) == (column.metric, column.labels)
        ]
        own = json.loads(column.settings)
        differing = [
            f"{key} {own.get(key)}" for key in own if len({json.dumps(other.get(key)) for other in alike}) > 1
        ]
        if len({other.get("recipe") for other in alike}) == len(alike):  # which says all else
            differing = [text for text in differing if text.startswith("recipe ")]
        labels = (
            []
            if column.labels == "all"
            else [f"{column.labels} labels" if column.labels.endswith("%") else column.labels]
        )
        headings[column] = ", ".join([_METRICS[column.metric], *labels, *differing])
    return headings


def _values(runs: list[Run]) -> dict[Column, list[float]]:
    values: dict[Column, list[float]] = {}
    for run in runs:
        own: dict[Column, list[float]] = {}
        for result in run.results:
            settings = {key: value for key, value in result["settings"].items() if key != "seed"}
            own.setdefault(
                Column(result["metric"], result["labels"], json.dumps(settings, sort_keys=True)), []
            ).append(result["top1"])
        for column, drawn in own.items():
            values.setdefault(column, []).append(
                fmean(drawn)
            )  # several draws of few labels count as one number of this run
    return values


def spread(values: list[float]) -> str:
    """Mean and, of two or more, sample standard deviation."""
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def draw(settings: list[Setting], headings: dict[Column, str]) -> Figure:
    """A panel a column, a row a setting that has a number beside it: every seed as a ring, their mean as a stroke with its deviation."""
    rows = math.ceil(len(headings) / PANELS_A_ROW)
    columns = math.ceil(len(headings) / rows)
    shown = [list(headings)[row * columns : (row + 1) * columns] for row in range(rows)]
    listed = [[setting for setting in settings if not setting.values.keys().isdisjoint(row)] for row in shown]
    heights = [0.9 + 0.36 * len(row) for row in listed]
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(
            figsize=(2.6 + 2.2 * columns, sum(heights)), layout="constrained", facecolor=light("--surface")
        )
        panels = figure.subplots(rows, columns, sharey="row", squeeze=False, height_ratios=heights)
        for axes in panels[-1, len(shown[-1]) :]:
            axes.set_visible(False)
        for panel_row, row, own in zip(panels, shown, listed):
            for axes, column in zip(panel_row, row):
                _draw_panel(axes, own, column, heading=headings[column])
    return figure


def _draw_panel(axes: Axes, settings: list[Setting], column: Column, *, heading: str) -> None:
    axes.set_facecolor(light("--surface"))
    axes.set_title(textwrap.fill(heading, 26), loc="left", fontsize=9, color=light("--ink"))
    for place, setting in enumerate(settings):
        if column in setting.values:
            _draw_setting(axes, place, setting, setting.values[column])
    axes.set_yticks(range(len(settings)), [textwrap.fill(setting.name, 36) for setting in settings])
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(labelsize=8, labelcolor=light("--soft"), length=0)
    axes.grid(axis="x", color=light("--line"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("top-1, %", fontsize=8, color=light("--soft"))


def _draw_setting(axes: Axes, place: int, setting: Setting, values: list[float]) -> None:
    colour = light(
        "--soft"
        if setting.name.startswith("teacher")
        else "--series-0"
        if setting.name.startswith("dmae")
        else "--series-1"
    )
    axes.errorbar(
        fmean(values),
        place,
        xerr=stdev(values) if len(values) > 1 else None,
        fmt="|",
        markersize=9,
        color=colour,
        linewidth=1.4,
    )
    axes.plot(
        values,
        [place] * len(values),
        "o",
        markersize=4,
        markerfacecolor="none",
        markeredgecolor=colour,
        alpha=0.7,
    )


def rank(runs: list[Run]) -> str:
    """Effective rank at the end of training, of the runs that watched it, and the lowest of them."""
    ranks = [run.rank for run in runs if not math.isnan(run.rank)]
    return (
        NOT_WATCHED
        if not ranks
        else f"{fmean(ranks):.1f} ({min(ranks):.1f})"
        if len(ranks) > 1
        else f"{ranks[0]:.1f}"
    )


def cost(runs: list[Run]) -> str:
    """Mean wall time of pre-training, in minutes below two hours."""
    hours = math.fsum(run.hours for run in runs) / len(runs)
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:.1f} h"
