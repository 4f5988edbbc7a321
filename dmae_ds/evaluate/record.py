"""The record of a run on disk: its recipe, one line of metrics per step, its results (no torch)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import read_history, read_results

_NOT_LOSSES = ("step", "epoch", "lr", "images_per_s")
_NOT_LOSS_PREFIXES = ("share/", "seconds/", "rank/", "norm/", "knn/", "dense/", "target/", "val/", "spread/")
TIMES = ("data", "teacher", "rest")  # parts of a step's time, seconds/<part> in metrics.jsonl


@dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    rows: the finished steps in order, as train/metrics.py writes them; results, history: as
    evaluate/results.py reads them
    """

    path: Path
    config: RunConfig
    rows: list[dict]
    results: list[dict]
    history: list[dict] = field(default_factory=list)

    @property
    def knn(self) -> dict | None:
        """The newest k-NN result with all labels; None before `dmae-ds eval knn`."""
        for result in reversed(self.results):
            if result["metric"] == "knn" and result["labels"] == "all":
                return result
        return None

    @property
    def knn_at_start(self) -> dict | None:
        """The k-NN result of the initial student under `knn`'s settings; None where it was not measured."""
        fixed = ("metric", "labels", "subset_seed", "settings")
        for result in [] if self.knn is None else self.history:
            if result["step"] == 0 and all(result[name] == self.knn[name] for name in fixed):
                return result
        return None

    @property
    def losses(self) -> list[str]:
        """Names of the losses: `loss`, then its named parts."""
        return [
            name
            for name in self.rows[0]
            if name not in _NOT_LOSSES and not name.startswith(_NOT_LOSS_PREFIXES)
        ]

    def named(self, prefix: str) -> list[str]:
        """Columns that start with a prefix, such as `share/`, and that at least one step has."""
        return sorted({name for row in self.rows for name in row if name.startswith(prefix)}, key=_by_number)

    def column(self, name: str) -> list[float]:
        """A column's values, from the steps that have it."""
        return [row[name] for row in self.rows if name in row]

    def epochs(self, name: str) -> list[float]:
        """The epochs at the end of the steps that have a column."""
        return [row["epoch"] for row in self.rows if name in row]

    def last_tenth(self, name: str) -> float:
        """The mean of the finite values in the last tenth of a column; NaN without any."""
        values = self.column(name)
        finite = [value for value in values[-math.ceil(len(values) / 10) :] if math.isfinite(value)]
        return fmean(finite) if finite else math.nan

    def at_start(self, name: str) -> float:
        """A column's value in the first step of the run; NaN where it was not measured."""
        first = self.rows[0]
        return first.get(name, math.nan) if first.get("step") == 1 else math.nan

    def seconds(self) -> dict[str, float]:
        """Median seconds per step of each part of the time: {"data": ..., "teacher": ..., "rest": ...}.

        {} for a run that did not measure them.
        """
        columns = {part: self.column(f"seconds/{part}") for part in TIMES}
        return {part: median(values) for part, values in columns.items()} if all(columns.values()) else {}


def read_record(path: Path) -> RunRecord:
    """Read a run folder, also during training.

    Raises UserError for a folder that is not a run, or that has no metrics yet.
    """
    config = read_saved_config(path)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if not rows:
        raise UserError(
            f"run '{path}' has no metrics yet; training writes them every log.every_steps = "
            f"{config.log.every_steps} steps: wait for the first, or train it"
        )
    return RunRecord(path, config, rows, read_results(path), read_history(path))


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the incomplete line of a killed run


def _by_number(name: str) -> tuple[str, int, str]:
    """Sort key that puts norm/3 before norm/12."""
    prefix, _, rest = name.partition("/")
    return prefix, int(rest) if rest.isdigit() else 0, rest
