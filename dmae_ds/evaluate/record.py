"""What a run has left on disk about itself: its recipe, a line of metrics a step, what evaluations found (no torch)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import read_results

_NOT_LOSSES = ("step", "epoch", "lr", "images_per_s")
_NOT_LOSSES_EITHER = ("share/", "seconds/", "rank/", "norm/", "knn/", "target/")
TIMES = ("data", "teacher", "rest")  # train/clock.py


@dataclass(frozen=True)
class RunRecord:
    """One run. `rows` are the finished steps in order, as `train/metrics.py` wrote them; `results` as `evaluate/results.py` reads them."""

    path: Path
    config: RunConfig
    rows: list[dict]
    results: list[dict]

    @property
    def knn(self) -> dict | None:
        """The newest k-NN with all labels; None before `dmae-ds eval knn`."""
        return next(
            (
                result
                for result in reversed(self.results)
                if result["metric"] == "knn" and result["labels"] == "all"
            ),
            None,
        )

    @property
    def losses(self) -> list[str]:
        """`loss`, then its named parts."""
        return [
            name
            for name in self.rows[0]
            if name not in _NOT_LOSSES and not name.startswith(_NOT_LOSSES_EITHER)
        ]

    def named(self, prefix: str) -> list[str]:
        """Columns that any step has, such as those of `share/`: how much of the gradient at a student block comes from distillation."""
        return sorted({name for row in self.rows for name in row if name.startswith(prefix)}, key=_by_number)

    def column(self, name: str) -> list[float]:
        """A column's values, of the steps that have it."""
        return [row[name] for row in self.rows if name in row]

    def epochs(self, name: str) -> list[float]:
        """Where those steps ended."""
        return [row["epoch"] for row in self.rows if name in row]

    def last_tenth(self, name: str) -> float:
        """The mean over the last tenth of a column's values (at least one); NaN where none of them is finite."""
        values = self.column(name)
        finite = [value for value in values[-math.ceil(len(values) / 10) :] if math.isfinite(value)]
        return fmean(finite) if finite else math.nan

    def seconds(self) -> dict[str, float]:
        """What a step's time went into, the median of each part: {"data": ..., "teacher": ..., "rest": ...}; {} for a run that didn't measure."""
        columns = {part: self.column(f"seconds/{part}") for part in TIMES}
        return {part: median(values) for part, values in columns.items()} if all(columns.values()) else {}


def read_record(path: Path) -> RunRecord:
    """Read a run folder, also while the run is under way. Raises UserError for another folder, or before the first metrics."""
    config = read_saved_config(path)
    metrics = path / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if not rows:
        raise UserError(
            f"run '{path}' has no metrics yet: they come every log.every_steps = {config.log.every_steps} steps; wait for the first, or train it"
        )
    return RunRecord(path, config, rows, read_results(path))


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the half line of a killed run


def _by_number(name: str) -> tuple[str, int, str]:
    """norm/3 before norm/12."""
    room, _, rest = name.partition("/")
    return room, int(rest) if rest.isdigit() else 0, rest
