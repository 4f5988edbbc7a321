"""Run folders as the results page needs them: facts to compare with a paper's row, last results, cost."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.facts import rank_of
from dmae_ds.evaluate.record import RunRecord, read_record
from dmae_ds.train.checkpoint.folder import CheckpointFolder

# Depths of timm's plain vision transformers, to know three quarters of a depth without building a network.
DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32, "giant": 40, "gigantic": 48}
FILES_OF_A_RUN = ("student.safetensors", "metrics.jsonl")  # an evaluation's folder has no student.safetensors


@dataclass(frozen=True)
class Run:
    """One run folder, read for the results page.

    facts: as `collect_facts` gives them; facts["finished"]: whether it came to its end
    results: those of its last step; hours: wall time of pre-training; world_size: its ranks, None if not
    known
    rank: effective rank of what the objective is judged by, over the last tenth of training; NaN if not
    measured
    """

    path: Path
    config: RunConfig
    facts: dict[str, object]
    results: list[dict]
    hours: float
    world_size: int | None
    rank: float = math.nan

    @property
    def gpu_hours(self) -> float | None:
        return None if self.world_size is None else self.hours * self.world_size


def find_runs(folders: list[Path]) -> list[Run]:
    """Find every run in these folders that has begun, in the order of seed and path.

    A folder may be a run, or contain some at any depth. Raises UserError for a folder without a run.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        inside = [
            path
            for path in walk_folders(folder)
            if all((path / name).is_file() for name in ("config.yaml", *FILES_OF_A_RUN))
        ]
        if not inside:
            raise UserError(
                f"no run found in '{folder}'; give run folders of `dmae-ds train`, or a folder of some"
            )
        runs |= {run.resolve(): read_run(run) for run in inside}
    return [runs[path] for path in sorted(runs, key=lambda path: (runs[path].config.run.seed, path))]


def walk_folders(top: Path) -> Iterator[Path]:
    """A folder and those inside it, also through links; each once, in the order of their paths."""
    seen: set[Path] = set()
    for path, names, _ in os.walk(top, followlinks=True):
        folder = Path(path)
        if (real := folder.resolve()) in seen:
            names.clear()  # a link to what was already walked
            continue
        seen.add(real)
        names.sort()
        yield folder


def read_run(path: Path) -> Run:
    """Read one run folder. Raises UserError."""
    record = read_record(path)
    config, last_step = record.config, record.rows[-1]["step"]
    # An evaluation that starts from random weights is stored with the run, and belongs to no step of it.
    results = [
        result
        for result in record.results
        if result["step"] == last_step or result["settings"].get("init") == "random"
    ]
    return Run(
        path,
        config,
        facts=collect_facts(config, _num_images(record), last_step),
        results=results,
        hours=_hours(record),
        world_size=_read_state(path).get("world_size"),
        rank=rank_of(record),
    )


def collect_facts(config: RunConfig, num_images: int, step: int) -> dict[str, object]:
    """The settings that a row of a paper may name, as plain values.

    num_images: of an epoch; step: the last finished one
    """
    objective, optim = config.objective, config.optim
    teachers = config.named_teachers().values()
    pairs = _pairs(config)
    return {
        **objective.facts(),
        "objective": objective.name,
        "student": _name(config.student),
        "teacher": " + ".join(map(_name, teachers)) or None,
        "pairs": pairs,
        "quarters": _quarters(config, pairs),
        "distilled": objective.needs_teacher,
        "standardize": " + ".join(dict.fromkeys(teacher.standardize for teacher in teachers)) or None,
        "epochs": optim.epochs,
        "warmup_epochs": optim.warmup_epochs,
        "global_batch": optim.global_batch,
        "base_lr": optim.base_lr,
        "weight_decay": optim.weight_decay,
        "betas": tuple(optim.betas),
        "num_images": num_images,
        "finished": step * optim.global_batch > optim.epochs * num_images - optim.global_batch,
    }


def _name(model: ModelConfig) -> str:
    """timm's name without its tag, with the numbers that differ from the named network's."""
    numbers = model.overrides()
    if numbers.get("img_size") == 224 and "224" in model.name:
        del numbers["img_size"]
    return model.name.partition(".")[0] + (f" {sorted(numbers.items())}" if numbers else "")


def _pairs(config: RunConfig) -> tuple | None:
    """The distilled ((student block, teacher block), ...); None if there are none or depths are unknown."""
    distillation = config.objective.distillation
    if distillation is None or config.teacher is None:
        return None
    if distillation.pairs is not None:
        return tuple(sorted(tuple(pair) for pair in distillation.pairs))
    depths = [_depth(config.student), _depth(config.teacher)]
    return None if None in depths else (tuple(max(1, depth * 3 // 4) for depth in depths),)


def _quarters(config: RunConfig, pairs: tuple | None) -> list[list[int | None]] | None:
    """The distilled pairs in quarters of each network's depth, [[3, 3]]; None for what is at none of them."""
    depths = [model and _depth(model) for model in (config.student, config.teacher)]
    if pairs is None or None in depths:
        return None
    return [[_quarter(block, depth) for block, depth in zip(pair, depths, strict=True)] for pair in pairs]


def _quarter(block: int, depth: int) -> int | None:
    return next((part for part in (3, 1, 2, 4) if block == max(1, depth * part // 4)), None)


def _depth(model: ModelConfig) -> int | None:
    size = model.name.split("_")[1] if "_" in model.name else ""
    return model.depth or DEPTHS.get(size)


def _num_images(record: RunRecord) -> int:
    return round(record.rows[-1]["step"] * record.config.optim.global_batch / record.rows[-1]["epoch"])


def _hours(record: RunRecord) -> float:
    """Hours of training, from the throughput of every step: without the time of restarts and evaluations."""
    return math.fsum(record.config.optim.global_batch / row["images_per_s"] for row in record.rows) / 3600


def find_fingerprint(path: Path) -> str | None:
    """The fingerprint of a run's training shards, from its newest checkpoint; None if not known."""
    return _read_state(path).get("fingerprint")


def _read_state(path: Path) -> dict:
    """What the newest checkpoint of a run says of itself; {} if there is none that can be read."""
    folder = CheckpointFolder(path)
    try:
        latest = folder.latest()
        return {} if latest is None else folder.read_state(latest)
    except UserError:
        return {}
