"""The networks of a recipe at full size on fake CUDA, built by the functions that training uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from dmae_ds.config.load import load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.config.teachers import taps_of
from dmae_ds.data.batch import Batch
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.plan.geometry import meta_frozen_teacher
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.several import SeveralTeachers
from dmae_ds.teacher.top import Top

NUM_CLASSES = 1000


@dataclass
class MetaNetworks:
    """A recipe's networks on the meta device, before there are fake tensors."""

    config: RunConfig
    objective: Objective
    teachers: dict[str, tuple[MaskedViT, Top | None]]  # by name, as RunConfig.named_teachers has them


@dataclass
class Networks:
    """A recipe's networks on a fake GPU, and batches for them."""

    config: RunConfig
    objective: Objective
    teacher: FrozenTeacher | SeveralTeachers | NoTeacher
    normalize: nn.Module
    device: torch.device

    def batch(self, micro_batch: int) -> Batch:
        """A micro-batch as `copied` hands it over: on the device, with its ids on the host."""
        student, device = self.objective.student, self.device
        sides = [view.size or student.grid[0] * student.patch_size for view in self.objective.views]
        views = [torch.zeros(micro_batch, 3, side, side, dtype=torch.uint8, device=device) for side in sides]
        with unset_fake_temporarily():
            ids = torch.arange(micro_batch)
        return Batch(
            views[0],
            torch.zeros(micro_batch, student.num_patches, device=device),
            torch.zeros(micro_batch, dtype=torch.int64, device=device),
            ids,
            ids,
            more_views=tuple(views[1:]),
        )

    def prepared(self, micro_batch: int) -> PatchBatch:
        """A micro-batch as the student and the teacher take it."""
        return self.objective.prepare(self.batch(micro_batch), self.normalize)


def build_meta(recipe: str, *overrides: str) -> MetaNetworks:
    """Build a recipe's networks without a byte; call it outside of fake tensors."""
    config = load_config(recipe, list(overrides))
    objective, _ = build_objective(config, device="meta", num_classes=NUM_CLASSES)
    teachers = {
        name: meta_frozen_teacher(teacher, taps_of(name, objective.taps), num_classes=objective.num_classes)
        for name, teacher in config.named_teachers().items()
    }
    return MetaNetworks(config, objective, teachers)


def place(meta: MetaNetworks, device: torch.device) -> Networks:
    """Put the networks on a device of the fake tensors that are active."""
    config, objective = meta.config, on_device(meta.objective, device)
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    placed = {name: FrozenTeacher(**teacher_arguments(meta, name, device)) for name in meta.teachers}
    teacher = placed.get("") or (SeveralTeachers(placed) if placed else NoTeacher())
    return Networks(config, objective, objective.in_passes(teacher), normalize, device)


def teacher_arguments(meta: MetaNetworks, name: str, device: torch.device) -> dict:
    """Arguments of a frozen teacher, or of a stage of one, on a device."""
    config, (vit, top) = meta.config, meta.teachers[name]
    for part in (vit, top):
        if part is not None:
            on_device(part, device).eval().requires_grad_(False)
    statistics = {"mean": config.data.mean, "std": config.data.std}
    own = {"teacher_mean": (0.5,) * 3, "teacher_std": (0.5,) * 3}
    view = PatchView(vit.patch_size, **statistics, **own).to(device)
    return {
        "vit": vit,
        "taps": taps_of(name, meta.objective.taps),
        "parts": None,
        "view": view,
        "sees": seen_patches(config.named_teachers()[name], meta.objective.student.num_patches),
        "top": top,
    }


def on_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace a module's tensors by fake ones on a device, each once, also where two names share one."""
    made: dict[int, torch.Tensor] = {}

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moving = nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = moving
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
    return module
