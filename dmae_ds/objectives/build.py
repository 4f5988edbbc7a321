"""A recipe -> the objective that is trained, with its student and the shape of its teacher."""

from __future__ import annotations

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.models.vit import build_student
from dmae_ds.objectives import OBJECTIVES
from dmae_ds.objectives.dmae import TeacherShape
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.teacher.grid import check_grids


def build_objective(config: RunConfig, *, device: str = "cpu") -> tuple[torch.nn.Module, TeacherShape | None]:
    """The objective with its student, initialised by run.seed alone: the same weights on every rank.

    device: `meta` for its geometry without a byte of weights
    Raises ValueError (one line) for numbers that don't fit together.
    """
    generator = torch.Generator().manual_seed(config.run.seed)
    student = build_student(config.student.name, config.student.overrides(), generator=generator, device=device)
    parts = {"student": student, "generator": generator}
    shape = None
    if config.teacher is not None:
        teacher = meta_teacher(config.teacher.name, config.teacher.overrides())
        check_grids(
            student_grid=student.grid, student_patch=student.patch_size, teacher_grid=teacher.grid, teacher_patch=teacher.patch_size,
        )  # fmt: skip
        shape = TeacherShape(depth=teacher.depth, embed_dim=teacher.embed_dim)
        parts["teacher"] = shape
    with torch.device(device):
        return OBJECTIVES[config.objective.name](config.objective, **parts), shape
