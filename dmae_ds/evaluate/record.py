"""What a run has left on disk about itself: its recipe, a line of metrics a step, the last k-NN (no torch)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError

KNN_FILE = "knn.json"
_NOT_LOSSES = ("step", "epoch", "lr", "images_per_s")


@dataclass(frozen=True)
class RunRecord:
    """One run. `rows` are the finished steps in order, as `train/metrics.py` wrote them; `knn` is None before `dmae-ds eval knn`."""

    path: Path
    config: RunConfig
    rows: list[dict]
    knn: dict | None

    @property
    def losses(self) -> list[str]:
        """`loss`, then its named parts."""
        return [name for name in self.rows[0] if name not in _NOT_LOSSES and not name.startswith("share/")]

    @property
    def shares(self) -> list[str]:
        """`share/<student block>`: how much of the gradient there comes from distillation."""
        return [name for name in self.rows[0] if name.startswith("share/")]

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]

    def last_tenth(self, name: str) -> float:
        """The mean over the last tenth of the steps (at least one); NaN where none of them is finite."""
        values = self.column(name)[-math.ceil(len(self.rows) / 10) :]
        finite = [value for value in values if math.isfinite(value)]
        return fmean(finite) if finite else math.nan


def read_record(path: Path) -> RunRecord:
    """Read a run folder, also while the run is under way. Raises UserError for another folder, or before the first metrics."""
    config = read_saved_config(path)
    metrics, knn = path / "metrics.jsonl", path / KNN_FILE
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [row for row in map(_parse, lines) if row is not None]
    if not rows:
        raise UserError(f"run '{path}' has no metrics yet: they come every log.every_steps = {config.log.every_steps} steps; wait for the first, or train it")
    return RunRecord(path, config, rows, json.loads(knn.read_text()) if knn.is_file() else None)


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # the half line of a killed run
