"""RUN/results.jsonl: every number that an evaluation found, one line a number, with all that defines it (no torch).

The newest line of equal (metric, labels, subset_seed, settings) counts; older ones stay, as the history of a student
that was still being trained. Written whole under another name and renamed, so a line is there or it isn't.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Iterator

from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import check_labels
from dmae_ds.output.durable import replacing

RESULTS_FILE = "results.jsonl"
METRICS = ("knn", "linear", "probe", "finetune", "supervised")
# Field -> the types that its value may have.
FIELDS = {
    "metric": str,  # one of METRICS
    "top1": (int, float),  # percent
    "top5": (int, float, type(None)),  # percent; None: not measured, or of five classes or fewer
    "labels": str,  # all, 10%, 5-shot: evaluate/subsets.py
    "subset_seed": (int, type(None)),  # None: labels all
    "settings": dict,  # flat: what defines the evaluation, such as k, temperature, pool, recipe, epochs
    "step": int,  # the student's
    "num_train": int,  # labelled pictures that were used
    "num_val": int,
    "data": str,  # fingerprint of data.train
    "seconds": (int, float),  # wall
    "device": str,  # "cpu", or the GPU's name
    "world_size": int,
    "when": str,  # ISO 8601, UTC
}


def append_result(run: Path, result: dict) -> dict:
    """Add one line to RUN/results.jsonl and return it; `when` is filled in if it is left out. To be called by one process.

    Raises ValueError for a result that lacks a field of FIELDS, has another or one of a wrong type: a bug of ours.
    """
    result = {**result, "when": result.get("when", datetime.now(timezone.utc).isoformat(timespec="seconds"))}
    _check(result)
    path = run / RESULTS_FILE
    with _alone(run):
        before = path.read_bytes() if path.is_file() else b""
        with replacing(path) as file:
            file.write(before + json.dumps({name: result[name] for name in FIELDS}).encode() + b"\n")
    return result


def read_results(run: Path) -> list[dict]:
    """The newest line of each (metric, labels, subset_seed, settings), the newest last; [] without a file. Raises UserError."""
    return _newest(_read_lines(run), "metric", "labels", "subset_seed", "settings")


def read_history(run: Path) -> list[dict]:
    """The newest line of each (metric, labels, subset_seed, settings, step), by step: a curve over training. Raises UserError."""
    by_step = _newest(_read_lines(run), "metric", "labels", "subset_seed", "settings", "step")
    return sorted(by_step, key=lambda result: result["step"])


def _read_lines(run: Path) -> list[dict]:
    path = run / RESULTS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(json.loads(line))
            _check(results[-1])
        except ValueError as error:
            raise UserError(f"'{path}', line {number} is no result ({error}); remove the line") from None
    return results


def _newest(results: list[dict], *names: str) -> list[dict]:
    found: dict[str, dict] = {}
    for result in results:
        key = json.dumps([result[name] for name in names], sort_keys=True)
        found.pop(key, None)
        found[key] = result
    return list(found.values())


def _check(result: dict) -> None:
    if not isinstance(result, dict) or set(result) != set(FIELDS):
        raise ValueError(
            f"found {sorted(result) if isinstance(result, dict) else result!r}, expected the fields {', '.join(FIELDS)}"
        )
    for name, types in FIELDS.items():
        if not isinstance(result[name], types) or isinstance(result[name], bool):
            raise ValueError(f"{name} is {result[name]!r}")
    if result["metric"] not in METRICS:
        raise ValueError(f"metric is {result['metric']!r}, expected one of {', '.join(METRICS)}")
    for name in ("top1", "top5"):
        if result[name] is not None and not 0 <= result[name] <= 100:
            raise ValueError(f"{name} is {result[name]}, expected percent")
    if not math.isfinite(result["seconds"]):
        raise ValueError(f"seconds is {result['seconds']}")
    if check_labels(result["labels"], result["subset_seed"]) != result["subset_seed"]:
        raise ValueError(f"subset_seed is None with labels {result['labels']}")
    for name, value in result["settings"].items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"settings.{name} is {value!r}, expected a plain value")


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Two evaluations of one run may end at the same moment: the second waits, and neither's line is lost."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
