"""What settings are compared by: one number a seed, by one evaluation that the settings share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean

from dmae_ds.report.study import Column, Setting, collect_values, list_columns


@dataclass(frozen=True)
class Measure:
    """A kind of evaluation: of these metrics, with these labels and, of its settings, this pool."""

    metrics: tuple[str, ...]
    labels: str = "all"
    pool: str | None = None  # None: any

    def takes(self, column: Column) -> bool:
        """Whether a column of the study is of this kind."""
        pool = json.loads(column.settings).get("pool")
        return column.metric in self.metrics and column.labels == self.labels and self.pool in (None, pool)


# By title, in the order of the tables' columns.
MEASURES = {
    "k-NN": Measure(("knn",), pool="mean"),
    "probe": Measure(("probe",), pool="mean"),
    "probe, 1% labels": Measure(("probe",), "1%", pool="mean"),
    "fine-tuned": Measure(("finetune", "supervised")),
    "dense k-NN": Measure(("dense_knn",)),
    "linear segmentation": Measure(("dense_linear",)),
    "segmentation": Measure(("segment",)),
    "detection": Measure(("detect",)),
}


def find_shared(measure: Measure, settings: list[Setting]) -> Column | None:
    """The column of this kind that all settings have a number in; of several the one with most seeds."""
    shared = [
        column
        for column in list_columns(settings)
        if measure.takes(column) and all(column in setting.values for setting in settings)
    ]
    num_seeds = {
        column: len(set.intersection(*(set(by_seed(setting, column)) for setting in settings)))
        for column in shared
    }
    return max(shared, key=num_seeds.__getitem__, default=None)  # the first of equals


def find_own(measure: Measure, setting: Setting) -> Column | None:
    """The column of this kind that a setting has a number in; None if it has several or none."""
    own = [column for column in setting.values if measure.takes(column)]
    return own[0] if len(own) == 1 else None


def by_seed(setting: Setting, column: Column) -> dict[int, float]:
    """The numbers of a column by the seed of their runs; the mean of runs of one seed."""
    numbers: dict[int, list[float]] = {}
    for run in setting.runs:
        numbers.setdefault(run.config.run.seed, []).extend(collect_values([run]).get(column, []))
    return {seed: fmean(values) for seed, values in numbers.items() if values}
