"""What a person asks first about a run, in words: what it is, how far it came, and whether its teacher is heard."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from torch import nn

from dmae_ds.config.run import ModelConfig
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.objectives.dmae import TeacherShape
from dmae_ds.teacher.frozen import needed_depths

DEAD_SHARE = 0.05  # of the gradient; below it a term is all but absent: the published code's has about 2%


class Fact(NamedTuple):
    """An answer, and the small print under it."""

    text: str
    note: str = ""


def list_facts(record: RunRecord, objective: nn.Module, shape: TeacherShape | None) -> dict[str, Fact]:
    """The answers by question, the weightiest first; `objective` and `shape` as the trainer builds them from the recipe."""
    config, last = record.config, record.rows[-1]
    num_parameters = sum(parameter.numel() for parameter in objective.student.parameters())
    return {
        "k-NN top-1": _knn(record),
        **{f"{name} at the end": _loss(record, name) for name in record.losses},
        **{f"share of distillation, block {block_of(name)}": _share(record.last_tenth(name)) for name in record.shares},
        "objective": Fact(config.objective.name, objective.describe()),
        "student": Fact(config.student.name, _joined(f"{num_parameters / 1e6:.3g} M parameters", _overrides(config.student))),
        "teacher": _teacher(record, objective, shape),
        "steps": Fact(f"{last['step']:,}", f"{last['epoch']:.3g} of {config.optim.epochs:g} epochs, {config.optim.global_batch:,} images a step"),
        "images/s, median": Fact(f"{median(record.column('images_per_s')):,.0f}"),
        "DeepSpeed, precision": Fact(f"{config.deepspeed}, {config.precision}"),
        "seed": Fact(str(config.run.seed)),
    }


def find_dead_terms(record: RunRecord, name: str) -> list[str]:
    """A sentence for every distilled block whose share of the gradient has died; `name` is what the reader calls the run."""
    advice = "raise objective.alpha"
    if getattr(record.config.objective, "normalize", "none") != "none":
        advice += ", or compare raw features with objective.normalize=none"
    sentences = []
    for column in record.shares:
        share = record.last_tenth(column)
        if share < DEAD_SHARE:
            sentences.append(
                f"{name}: at student block {block_of(column)} only {share:.1%} of the gradient comes from distillation (mean of the last tenth "
                f"of the run; below {DEAD_SHARE:.0%} counts as dead). The student hardly hears its teacher: {advice}."
            )
    return sentences


def block_of(column: str) -> str:
    """ "share/9" -> "9"."""
    return column.partition("/")[2]


def _knn(record: RunRecord) -> Fact:
    knn, step = record.knn, record.rows[-1]["step"]
    if knn is None:
        return Fact("not measured", f"dmae-ds eval knn {record.path}")
    stale = f"measured at step {knn['step']:,}, before the last" if knn["step"] < step else f"step {knn['step']:,}"
    return Fact(
        f"{knn['top1']:.1f}%", f"k {knn['k']}, T {knn['temperature']:g}, {knn['pool']} pool; {knn['num_train']:,} train, {knn['num_val']:,} val; {stale}"
    )


def _loss(record: RunRecord, name: str) -> Fact:
    other_units = name == "pixel" and record.config.objective.norm_pix
    return Fact(f"{record.last_tenth(name):.4f}", "of normalised patches; not comparable with raw pixels" if other_units else "")


def _share(share: float) -> Fact:
    return Fact("not finite" if math.isnan(share) else f"{share:.1%}", "dead term" if share < DEAD_SHARE else "")


def _teacher(record: RunRecord, objective: nn.Module, shape: TeacherShape | None) -> Fact:
    teacher = record.config.teacher
    if teacher is None:
        return Fact("none")
    blocks, _ = needed_depths(objective.taps, shape.depth)
    return Fact(teacher.name, _joined(f"cut after block {blocks} of {shape.depth}", teacher.dtype, _overrides(teacher)))


def _overrides(model: ModelConfig) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in model.overrides().items())


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
