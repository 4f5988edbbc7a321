"""Runs as the results page sees them: flat facts to be matched with a row, results of the last step, what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.run import ModelConfig, RunConfig
from dmae_ds.errors import UserError
from dmae_ds.evaluate.facts import rank_of
from dmae_ds.evaluate.record import RunRecord, read_record
from dmae_ds.train.checkpoint.folder import CheckpointFolder

# Of timm's plain vision transformers, to know three quarters of their depth without building one.
DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32, "giant": 40, "gigantic": 48}


@dataclass(frozen=True)
class Run:
    """A run. facts["finished"]: whether it came to its end; results: those of its last step; hours: wall time of pre-training; world_size: its ranks, None if not known.

    rank: effective rank of what the objective is judged by, over the last tenth of training; NaN where it was
    not watched
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
    """Every run in these folders that has begun, by seed and path; a folder may be a run, or hold some, at any depth.

    Raises UserError for a folder without a run.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        # student.safetensors tells a run from an evaluation, whose folder has a config.yaml and metrics of its own
        inside = [
            path.parent
            for path in folder.rglob("config.yaml")
            if all((path.parent / name).is_file() for name in ("student.safetensors", "metrics.jsonl"))
        ]
        if not inside:
            raise UserError(
                f"'{folder}' holds no run; name run folders that `dmae-ds train` wrote, or a folder of some"
            )
        found |= {run.resolve(): read_run(run) for run in inside}
    return [found[path] for path in sorted(found, key=lambda path: (found[path].config.run.seed, path))]


def read_run(path: Path) -> Run:
    """One run folder. Raises UserError."""
    record = read_record(path)
    last = record.rows[-1]["step"]
    # one that starts from random weights lies beside the run, and has no step of it
    results = [
        result
        for result in record.results
        if result["step"] == last or result["settings"].get("init") == "random"
    ]
    return Run(
        path,
        record.config,
        facts_of(record.config, _num_images(record), last),
        results,
        _hours(record),
        _world_size(path),
        rank_of(record),
    )


def facts_of(config: RunConfig, num_images: int, step: int) -> dict[str, object]:
    """What a row of a paper may fix, as plain values. num_images: of an epoch; step: the last finished one."""
    objective, teacher, optim = config.objective, config.teacher, config.optim
    return {
        **objective.facts(),
        "objective": objective.name,
        "student": _name(config.student),
        "teacher": None if teacher is None else _name(teacher),
        "pairs": _pairs(config),
        "distilled": objective.needs_teacher,
        "standardize": None if teacher is None else teacher.standardize,
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
    """timm's name without its tag; with numbers of its own, it is another network."""
    numbers = model.overrides()
    if numbers.get("img_size") == 224 and "224" in model.name:
        del numbers["img_size"]
    return model.name.partition(".")[0] + (f" {sorted(numbers.items())}" if numbers else "")


def _pairs(config: RunConfig) -> tuple | None:
    """((student block, teacher block), ...), where the depths are known."""
    distillation = config.objective.distillation
    if distillation is None or config.teacher is None:
        return None
    if distillation.pairs is not None:
        return tuple(sorted(tuple(pair) for pair in distillation.pairs))
    depths = [
        model.depth or DEPTHS.get(model.name.split("_")[1] if "_" in model.name else "")
        for model in (config.student, config.teacher)
    ]
    return None if None in depths else (tuple(max(1, depth * 3 // 4) for depth in depths),)


def _num_images(record: RunRecord) -> int:
    return round(record.rows[-1]["step"] * record.config.optim.global_batch / record.rows[-1]["epoch"])


def _hours(record: RunRecord) -> float:
    """From the throughput of every step: what a restart or an evaluation took is not in it."""
    return math.fsum(record.config.optim.global_batch / row["images_per_s"] for row in record.rows) / 3600


def _world_size(path: Path) -> int | None:
    folder = CheckpointFolder(path)
    try:
        latest = folder.latest()
        return None if latest is None else folder.read_state(latest)["world_size"]
    except UserError:
        return None
