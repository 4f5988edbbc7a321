"""Small objectives in float64, small batches of noise, and the steps of a run without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Iterator

import torch
from torch import Tensor

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.needs import Progress
from dmae_ds.train.ema import EmaTeacher
from dmae_ds.train.engine import Engine
from dmae_ds.train.optim import build_optimizer
from tests.objectives.reference import MEAN, STD

SIZE, PATCH, DIM, HEADS, DEPTH, GRID = 16, 4, 8, 2, 4, 4
TEACHER = {
    "name": "vit_tiny_patch16_224",
    "img_size": SIZE,
    "patch_size": PATCH,
    "embed_dim": 12,
    "depth": 8,
    "num_heads": 2,
    "weights": "unused",
}
DECODER = {"depth": 2, "embed_dim": 12, "num_heads": 3}


def config_for(
    objective: dict, *, teacher: bool | dict = False, teachers: dict | None = None, **student: object
) -> RunConfig:
    """A small recipe. teacher: whether there is one, or the numbers in which it differs from TEACHER.

    teachers: by name, the same numbers of several; student: keys that differ
    """
    several = {name: {**TEACHER, **numbers} for name, numbers in (teachers or {}).items()}
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused"},
            "teacher": {**TEACHER, **(teacher if isinstance(teacher, dict) else {})} if teacher else None,
            "teachers": several or None,
            "objective": objective,
            "student": {
                "name": "vit_tiny_patch16_224",
                "img_size": SIZE,
                "patch_size": PATCH,
                "embed_dim": DIM,
                "depth": DEPTH,
                "num_heads": HEADS,
                **student,
            },
        }
    )


def build(objective: dict, *, seed: int = 0, **recipe: object) -> Objective:
    """Build it in float64, away from its initial weights: biases of 0 and gains of 1 would hide mistakes.

    recipe: as `config_for` takes it
    """
    built, _ = build_objective(config_for(objective, **recipe))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return built.double()


def make_batch(num: int, *, sizes: tuple[int, ...] = (SIZE,), seed: int = 0) -> Batch:
    """Return images of noise, a view of each size, and mask noise."""
    generator = torch.Generator().manual_seed(seed)
    views = [
        torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator) for size in sizes
    ]
    return Batch(
        images=views[0], noise=torch.rand(num, GRID**2, generator=generator), more_views=tuple(views[1:])
    )


def prepare(objective: Objective, batch: Batch):
    """Return `objective.prepare` with pixels normalised in float64, as in the reference."""
    return objective.prepare(batch, lambda pixels: (pixels.double() / 255 - MEAN) / STD)


class Stepper:
    """The steps of a run without DeepSpeed: schedules, EMA teacher, AdamW with the recipe's groups."""

    def __init__(self, objective: Objective, *, num_steps: int, epochs: float, lr: float):
        self.objective, self.num_steps, self.epochs, self.lr = objective, num_steps, epochs, lr
        self.keeper = EmaTeacher(objective, precision="fp32", device=torch.device("cpu"))
        self.optimizer = build_optimizer(objective, config_for({"name": "mae"}).optim)

    def progress(self, step: int) -> Progress:
        return Progress(step, self.num_steps, step / self.num_steps * self.epochs, self.epochs)

    def step(
        self, number: int, micro_batches: list[Batch], features: dict[str, Tensor] | None = None
    ) -> float:
        """Take one optimiser step and return the mean loss."""
        self.objective.start_step(self.progress(number))
        engine = SimpleNamespace(
            objective=self.objective,
            _engine=SimpleNamespace(optimizer=self.optimizer),
            full_parameters=self._full_parameters,
        )
        Engine.set_lr(engine, self.lr)
        self.optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches:
            masked = prepare(self.objective, batch)
            loss = self.objective(masked, {**(features or {}), **self.keeper.features(masked)})["loss"] / len(
                micro_batches
            )
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.keeper.after_step(engine, self.progress(number), self.progress(number + 1))
        return total

    def _full_parameters(self, parts: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        yield from (
            (name, parameter.detach())
            for name, parameter in self.objective.named_parameters()
            if name.split(".")[0] in parts
        )


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of which gradients can be taken."""
    return {
        name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_parameters()
    }
