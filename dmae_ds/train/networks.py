"""Building a run's networks: the objective with its initial weights, and the frozen teacher it asks for."""

from __future__ import annotations

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import TeacherShape, build_objective
from dmae_ds.objectives.initial import fill_student
from dmae_ds.teacher.build import load_frozen_teacher, verify
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher
from dmae_ds.teacher.pipeline import StageGroup, join_group
from dmae_ds.train.engine import check_ops, check_precision
from dmae_ds.train.preflight import Preflight


def build_networks(preflight: Preflight, device: torch.device) -> tuple[Objective, FrozenTeacher | NoTeacher]:
    """Build the objective with its initial weights and the teacher it asks for, and check the teacher.

    Collective.
    """
    config, num_classes = preflight.config, preflight.num_classes
    # Process groups are made before anything that may fail on one rank alone.
    group = None
    if config.teacher is not None and config.teacher.placement == "pipeline":
        group = join_group(config.teacher.stages)

    def build():
        check_precision(config.precision, device)
        check_ops(preflight.deepspeed, device)
        objective, shape = build_objective(config, num_classes=num_classes)
        if config.student.weights is not None and preflight.resume_from is None:
            objective.initial_notes = fill_student(objective.student, config.student.weights, config.student)
        teacher = build_teacher(config, shape, objective.taps, device, group, num_classes=num_classes)
        return objective, teacher

    objective, teacher = collectives.raise_on_all_ranks(build)
    if config.teacher is not None:
        collectives.raise_on_all_ranks(lambda: verify(teacher, config.teacher))
    return objective, teacher


def build_teacher(
    config: RunConfig,
    shape: TeacherShape | None,
    taps: tuple[str, ...],
    device: torch.device,
    group: StageGroup | None = None,
    *,
    num_classes: int | None = None,
) -> FrozenTeacher | NoTeacher:
    """Build the teacher that the taps ask for, cut after the deepest of them. No collective.

    group: the pipeline's process group; then only this rank's stage is built
    """
    if config.teacher is None:
        return NoTeacher()
    return load_frozen_teacher(
        config.teacher,
        taps=taps,
        whole_blocks=shape.depth,
        mean=config.data.mean,
        std=config.data.std,
        device=device,
        group=group,
        sharded=config.teacher.placement == "zero3",
        num_classes=num_classes,
    )
