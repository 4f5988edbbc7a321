"""The study: runs that differ only in their seed are one setting, with mean and deviation of every number."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from statistics import fmean, stdev

from dmae_ds.evaluate.results import METRICS, headline
from dmae_ds.report.runs import Run
from dmae_ds.report.sources import list_teaching_runs
from dmae_ds.report.study_names import (
    UNTRAINED,
    describe_training,
    is_untrained,
    list_defaults,
    name_settings,
)

_LABELS = ("all", "10%", "1%")
TEACHER = "teacher: "  # the names of runs that taught others start with this
NOT_WATCHED = "not watched"
NOT_RUN, ONE_SEED = "not run", "one seed"


@dataclass(frozen=True)
class Column:
    """A column of the study's table: one metric under one group of settings.

    settings: those of the evaluation, the beginning of its data's fingerprint, and the number of images it
    was measured on, as JSON
    """

    metric: str
    labels: str
    settings: str


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their seed.

    values: for each column the numbers of the runs that have one, in the order of the seeds
    training: what is trained, flat (`study_names.describe_training`)
    """

    name: str
    runs: list[Run]
    values: dict[Column, list[float]]
    training: dict[str, object] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return [run.config.run.seed for run in self.runs]


def group(runs: list[Run]) -> list[Setting]:
    """Group runs into settings, by objective and from the commonest recipe to those that differ most from it.

    Runs whose students teach other runs come last.
    """
    teachers = list_teaching_runs(runs)
    trainings: dict[tuple[str, str], dict] = {}
    members: dict[tuple[str, str], list[Run]] = {}
    data_names: dict[str, str] = {}
    for run in runs:
        training = describe_training(run.config, run.path, data_names)
        role = TEACHER if run.path.resolve() in teachers else ""
        key = (role, json.dumps(training, sort_keys=True))
        trainings[key] = training
        members.setdefault(key, []).append(run)
    defaults = list_defaults(runs)
    names = {}
    for role in {role for role, _ in trainings}:
        of_role = {key: training for key, training in trainings.items() if key[0] == role}
        untrained = [key for key, training in of_role.items() if is_untrained(training)]
        if len(untrained) == 1:
            names[untrained[0]] = role + UNTRAINED
            del of_role[untrained[0]]
        names |= {key: role + name for key, name in name_settings(of_role, defaults).items()}

    def order(key: tuple[str, str]) -> tuple:
        return key[0], trainings[key]["objective.name"], names[key].count(","), names[key]

    return [
        Setting(names[key], members[key], collect_values(members[key]), trainings[key])
        for key in sorted(members, key=order)
    ]


def collect_values(runs: list[Run]) -> dict[Column, list[float]]:
    """Collect the numbers of these runs by column, one number a run, in their order."""
    values: dict[Column, list[float]] = {}
    for run in runs:
        draws: dict[Column, list[float]] = {}
        # Each seed may have its own teacher; one run with several has several results.
        several_teachers = len({result["settings"].get("teacher") for result in run.results} - {None}) > 1
        pairs = {(result["data"], result["val"]) for result in run.results if result["val"]}
        several_vals = len(pairs) > len({data for data, _ in pairs})
        for result in run.results:
            left_out = {"seed"} if several_teachers else {"seed", "teacher"}
            settings = {key: value for key, value in result["settings"].items() if key not in left_out}
            settings["data"] = result["data"][:8]
            # Lines of earlier versions have no fingerprint of data.val.
            settings["val"] = result["val"][:8] if several_vals and result["val"] else result["num_val"]
            column = Column(result["metric"], result["labels"], json.dumps(settings, sort_keys=True))
            draws.setdefault(column, []).append(headline(result))
        for column, numbers in draws.items():
            # Several draws of few labels count as one number of this run.
            values.setdefault(column, []).append(fmean(numbers))
    return values


def list_columns(settings: list[Setting]) -> dict[Column, str]:
    """Every column that a setting has a value in, with its heading, by metric and from many labels to few."""
    columns = list(dict.fromkeys(column for setting in settings for column in setting.values))
    places = {name: place for place, name in enumerate((*METRICS, *_LABELS))}

    def order(column: Column) -> tuple:
        num_labels = places.get(column.labels, len(places))
        return places[column.metric], num_labels, column.labels, column.settings

    columns.sort(key=order)
    return {column: _head_column(column, columns) for column in columns}


def _head_column(column: Column, columns: list[Column]) -> str:
    """The metric, the labels unless all, and the settings that tell it from columns of the same two."""
    same_kind = [
        json.loads(other.settings)
        for other in columns
        if (other.metric, other.labels) == (column.metric, column.labels)
    ]
    settings = json.loads(column.settings)
    differing = [
        f"{key} {value}"
        for key, value in settings.items()
        if len({json.dumps(other.get(key)) for other in same_kind}) > 1
    ]
    if len({other.get("recipe") for other in same_kind}) == len(same_kind):  # the recipe tells them apart
        differing = [text for text in differing if text.startswith("recipe ")]
    heading = [METRICS[column.metric].title]
    if column.labels != "all":
        heading.append(f"{column.labels} labels" if column.labels.endswith("%") else column.labels)
    return ", ".join([*heading, *differing])


def format_values(values: list[float]) -> str:
    """Mean and, of two or more values, sample standard deviation."""
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def format_rank(runs: list[Run]) -> str:
    """Effective rank at the end of training, the mean of the runs that measured it and (the lowest)."""
    ranks = [run.rank for run in runs if not math.isnan(run.rank)]
    if not ranks:
        return NOT_WATCHED
    return f"{fmean(ranks):.1f} ({min(ranks):.1f})" if len(ranks) > 1 else f"{ranks[0]:.1f}"


def format_time(runs: list[Run]) -> str:
    """Mean wall time of pre-training, in minutes below two hours."""
    hours = math.fsum(run.hours for run in runs) / len(runs)
    return f"{60 * hours:.1f} min" if hours < 2 else f"{hours:.1f} h"
