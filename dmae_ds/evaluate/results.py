"""RUN/results.jsonl: every number that was measured of a run, one JSON object per line (no torch).

    {"metric": "knn", "scores": {"top1": 81.2, "top5": 97.0}, "labels": "all", "settings": {"k": 20, ...},
    ...}

The newest line of each (metric, labels, subset_seed, settings, data, val) counts; older lines stay as the
history of a student that was still being trained. A new metric is one entry of METRICS. Lines of earlier
versions have `top1` and `top5` in place of `scores`, or no `val`; they are read like the others, and stay as
they are when lines are added.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Iterator

from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import check_labels
from dmae_ds.output.durable import replacing
from dmae_ds.output.table import text_table

RESULTS_FILE = "results.jsonl"


@dataclass(frozen=True)
class Score:
    """One number of a metric: its title for people, its unit, and the range of its values."""

    title: str
    unit: str
    low: float
    high: float

    def format(self, value: float, digits: int = 1) -> str:
        """The value with its unit, such as 81.2%."""
        return f"{value:.{digits}f}{self.unit}"


@dataclass(frozen=True)
class Metric:
    """One kind of evaluation.

    scores: by name; headline: the name of the score that every result must have and that is shown alone
    """

    title: str
    scores: dict[str, Score]
    headline: str


TOP = {"top1": Score("top-1", "%", 0, 100), "top5": Score("top-5", "%", 0, 100)}
MIOU = {
    "miou": Score("mIoU", "%", 0, 100),
    "mean_accuracy": Score("mean accuracy", "%", 0, 100),
    "pixel_accuracy": Score("pixel accuracy", "%", 0, 100),
}
AP = {
    f"{kind}_{name}": Score(f"{kind} {title}", "", 0, 100)
    for kind in ("box", "mask")
    for name, title in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))
}
# In the order in which pages list them.
METRICS = {
    "knn": Metric("k-NN", TOP, "top1"),
    "probe": Metric("logistic probe", TOP, "top1"),
    "linear": Metric("linear probe", TOP, "top1"),
    "finetune": Metric("fine-tuned", TOP, "top1"),
    "supervised": Metric("supervised", TOP, "top1"),
    "agreement": Metric(
        "agreement of neighbours", {"overlap": Score("with the teacher's", "%", 0, 100)}, "overlap"
    ),
    "dense_knn": Metric("dense k-NN", MIOU, "miou"),
    "dense_linear": Metric("linear segmentation", MIOU, "miou"),
    "segment": Metric("segmentation", MIOU, "miou"),
    "detect": Metric("detection", AP, "box_ap"),
}
# Field -> the types that its value may have.
FIELDS = {
    "metric": str,  # a key of METRICS
    "scores": dict,  # {name: number}, names of METRICS[metric].scores, the headline among them
    "labels": str,  # all, 10%, 5-shot: evaluate/subsets.py
    "subset_seed": (int, type(None)),  # None with labels all
    "settings": dict,  # flat: what defines the evaluation, such as k, temperature, pool, recipe, epochs
    "step": int,  # of the student
    "num_train": int,  # labelled images that were used
    "num_val": int,
    "data": str,  # fingerprint of data.train
    "val": (str, type(None)),  # of data.val; None in lines of earlier versions, which newer ones replace
    "seconds": (int, float),  # wall time
    "device": str,  # "cpu", or the GPU's name
    "world_size": int,
    "when": str,  # ISO 8601, UTC
}
_SAME = (
    "metric",
    "labels",
    "subset_seed",
    "settings",
    "data",
)  # and val: of a result and those that replace it
_OLD_SCORES = ("top1", "top5")  # fields of their own in lines of earlier versions; top5 may be null


@dataclass(frozen=True)
class MeasuredOn:
    """The student's step, the data and the device of a measurement: fields of a result, see FIELDS."""

    labels: str
    subset_seed: int | None
    step: int
    num_train: int
    num_val: int
    data: str
    val: str
    device: str
    world_size: int


def make_result(
    measured_on: MeasuredOn, *, metric: str, scores: dict[str, float | None], settings: dict, seconds: float
) -> dict:
    """Put a result together, for `append_result`; scores that are None (not measured) are left out."""
    scores = {name: value for name, value in scores.items() if value is not None}
    return {
        "metric": metric,
        "scores": scores,
        "settings": settings,
        "seconds": seconds,
        **asdict(measured_on),
    }


def interval_95(percent: float, num_images: int) -> tuple[float, float]:
    """The 95% confidence interval of a share of right answers, in percent (Wilson 1927)."""
    z, share = 1.96, percent / 100
    middle = share + z * z / (2 * num_images)
    half = z * math.sqrt(share * (1 - share) / num_images + (z / (2 * num_images)) ** 2)
    scale = 100 / (1 + z * z / num_images)
    return max(0.0, scale * (middle - half)), min(100.0, scale * (middle + half))


def interval_text(percent: float, num_images: int) -> str:
    """The 95% interval as text: `95%: 77.1 to 84.7`."""
    low, high = interval_95(percent, num_images)
    return f"95%: {low:.1f} to {high:.1f}"


def results_table(rows: list[tuple[str, dict]]) -> list[str]:
    """A table of (run, result), a row each: labels, settings that differ, the headline score, of top-1 also
    its 95% interval.
    """
    metrics = list(dict.fromkeys(result["metric"] for _, result in rows))
    varying = []
    for metric in metrics:
        settings = [result["settings"] for _, result in rows if result["metric"] == metric]
        for name in dict.fromkeys(name for one in settings for name in one):
            if len({json.dumps(one.get(name)) for one in settings}) > 1 and name not in varying:
                varying.append(name)
    is_of_images = all(METRICS[metric].headline == "top1" for metric in metrics)  # a share of images
    titles = list(dict.fromkeys(headline_score(metric).title for metric in metrics))
    interval = ["95% interval"] if is_of_images else []
    kind = ["task"] if len(metrics) > 1 else []
    cells = [("run", *kind, "labels", *varying, " or ".join(titles), *interval, "images")]
    for run, result in rows:
        value, num_val = headline(result), result["num_val"]
        kind = [METRICS[result["metric"]].title] if len(metrics) > 1 else []
        settings = [str(result["settings"].get(name, "")) for name in varying]
        scores = [headline_score(result["metric"]).format(value)]
        if is_of_images:
            low, high = interval_95(value, num_val)
            scores.append(f"{low:.1f} to {high:.1f}")
        cells.append((run, *kind, result["labels"], *settings, *scores, f"{num_val:,}"))
    return text_table(cells, left=(0, 1))


def headline(result: dict) -> float:
    """The headline score of a result."""
    return result["scores"][METRICS[result["metric"]].headline]


def headline_score(metric: str) -> Score:
    """Title, unit and range of a metric's headline score."""
    return METRICS[metric].scores[METRICS[metric].headline]


def append_result(run: Path, result: dict) -> dict:
    """Add one line to RUN/results.jsonl and return it; `when` is filled in if it is left out.

    Call it on one process. Raises ValueError for missing or unknown fields and for wrong values: a bug of
    ours.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {**result, "when": result.get("when", now)}
    _check(result)
    path = run / RESULTS_FILE
    with _locked(run):
        before = path.read_bytes() if path.is_file() else b""
        with replacing(path) as file:
            file.write(before + json.dumps({name: result[name] for name in FIELDS}).encode() + b"\n")
    return result


def read_results(run: Path) -> list[dict]:
    """The newest line of each (metric, labels, subset_seed, settings, data, val), the newest last.

    It is [] without a file.

    Raises UserError for a line that is not a result.
    """
    return _newest(_read_lines(run), *_SAME)


def read_history(run: Path) -> list[dict]:
    """The newest line of each (metric, labels, subset_seed, settings, data, val, step), sorted by step.

    This is a curve over training. Raises UserError for a line that is not a result.
    """
    by_step = _newest(_read_lines(run), *_SAME, "step")
    return sorted(by_step, key=lambda result: result["step"])


def _read_lines(run: Path) -> list[dict]:
    path = run / RESULTS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            result = _completed(json.loads(line))
            _check(result)
        except ValueError as error:
            raise UserError(f"'{path}', line {number} is not a result ({error}); remove the line") from None
        results.append(result)
    return results


def _completed(line: object) -> object:
    """A line of an earlier version in today's form; other lines as they are."""
    if isinstance(line, dict):
        line = {**line, "val": line.get("val")}
    if not isinstance(line, dict) or "scores" in line or not set(_OLD_SCORES) <= set(line):
        return line
    result = {}
    for name, value in line.items():
        if name == "top1":  # at its old place, so that the order of the fields is FIELDS'
            result["scores"] = {old: line[old] for old in _OLD_SCORES if line[old] is not None}
        elif name != "top5":
            result[name] = value
    return result


def _newest(results: list[dict], *names: str) -> list[dict]:
    newest: dict[tuple[str, str | None], dict] = {}
    for result in results:
        same = json.dumps([result[name] for name in names], sort_keys=True)
        for replaced in {None, result["val"]}:
            newest.pop((same, replaced), None)
        newest[same, result["val"]] = result
    return list(newest.values())


def _check(result: object) -> None:
    if not isinstance(result, dict):
        raise ValueError(f"found {result!r}, expected an object with the fields {', '.join(FIELDS)}")
    if set(result) != set(FIELDS):
        raise ValueError(f"found {sorted(result)}, expected the fields {', '.join(FIELDS)}")
    for name, types in FIELDS.items():
        if not isinstance(result[name], types) or isinstance(result[name], bool):
            raise ValueError(f"{name} is {result[name]!r}")
    if result["metric"] not in METRICS:
        raise ValueError(f"metric is {result['metric']!r}, expected one of {', '.join(METRICS)}")
    _check_scores(METRICS[result["metric"]], result["scores"])
    if not math.isfinite(result["seconds"]):
        raise ValueError(f"seconds is {result['seconds']}")
    if check_labels(result["labels"], result["subset_seed"]) != result["subset_seed"]:
        raise ValueError(f"subset_seed is None with labels {result['labels']}")
    for name, value in result["settings"].items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ValueError(f"settings.{name} is {value!r}, expected a plain value")


def _check_scores(metric: Metric, scores: dict) -> None:
    if metric.headline not in scores or not set(scores) <= set(metric.scores):
        offered = ", ".join(metric.scores)
        raise ValueError(f"scores are {sorted(scores)}, expected {metric.headline}, and others of {offered}")
    for name, value in scores.items():
        low, high = metric.scores[name].low, metric.scores[name].high
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, expected a number from {low:g} to {high:g}")


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder's lock, so that two evaluations that end at the same moment lose no line."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
