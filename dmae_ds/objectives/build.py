"""A recipe -> the objective that is trained, with its student and the shape of its teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from dmae_ds.config.run import DataConfig, RunConfig, TeacherConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.models.vit import build_student
from dmae_ds.objectives import find_objective
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.frozen import meta_teacher, split_tap
from dmae_ds.teacher.grid import check_grids

IMAGENET_CLASSES = 1000


def build_objective(
    config: RunConfig, *, num_classes: int | None = None, device: str = "cpu"
) -> tuple[Objective, TeacherShape | None]:
    """The objective with its student, initialised by run.seed alone: the same weights on every rank. student.weights is read by whoever starts a run (initial.py).

    num_classes: of the labels, for an objective whose schema says `needs_labels`; None: as `count_classes` finds
    device: `meta` for its geometry without a byte of weights
    Raises ValueError (one line) for numbers that don't fit together.
    """
    generator = torch.Generator().manual_seed(config.run.seed)
    student = build_student(
        config.student.name, config.student.overrides(), generator=generator, device=device
    )
    parts = {"student": student, "generator": generator}
    if config.objective.needs_labels:
        parts["num_classes"] = num_classes or count_classes(config.data)
    shape = None
    if config.teacher is not None:
        teacher = meta_teacher(config.teacher.name, config.teacher.overrides())
        check_grids(
            student_grid=student.grid,
            student_patch=student.patch_size,
            teacher_grid=teacher.grid,
            teacher_patch=teacher.patch_size,
        )
        shape = TeacherShape(
            teacher.depth,
            teacher.embed_dim,
            config.teacher.decoder_depth,
            config.teacher.decoder_embed_dim,
            teacher.patch_size,
        )
        parts["teacher"] = shape
    with torch.device(device):
        objective = find_objective(config.objective.name)(config.objective, **parts)
    if config.teacher is not None:
        check_teacher_keys(config.teacher, objective.taps)
    return objective, shape


def check_teacher_keys(teacher: TeacherConfig, taps: tuple[str, ...]) -> None:
    """Raise UserError for keys of the teacher's section that these taps leave without effect."""
    kinds = {split_tap(tap)[0] for tap in taps}
    for names, needed, taps_of in (
        (
            ("decoder_depth", "decoder_embed_dim", "decoder_num_heads"),
            {"decoder", "prediction"},
            "the teacher's decoder",
        ),
        (("pool",), {"logits"}, "a classifier's logits"),
    ):
        for name in names:
            if getattr(teacher, name) != type(teacher).model_fields[name].default and not kinds & needed:
                raise UserError(
                    f"teacher.{name} is of no use to an objective that does not tap {taps_of}; remove it, or choose another objective.name"
                )
    if teacher.standardize != "none" and kinds & {"prediction", "logits"}:
        raise UserError(
            f"teacher.standardize {teacher.standardize} is for features, and the objective taps {', '.join(taps)}; set teacher.standardize=none"
        )


def count_classes(data: DataConfig) -> int:
    """The classes of data.train; where that isn't here, ImageNet-1k's, as `dmae-ds plan` counts pictures."""
    here = "://" not in data.train and Path(data.train).expanduser().exists()
    return len(ShardSet.open(data.train, label="data.train").classes) if here else IMAGENET_CLASSES
