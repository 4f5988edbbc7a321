"""The engine of a run, of one student or of a family.

Each student of a family has a DeepSpeed engine of its own, and all of them look like one to the loop. So
everything that DeepSpeed does is done for each as if it were alone: the cut of its weights over the ranks,
the buckets in which gradients travel, AdamW's order of operations, clipping by its own norm, the loss scale
of fp16. Members take turns, forward, backward and step, so that the activations of one are alive at a time.

A checkpoint has the files of each member in a folder of its name.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable

import torch
from torch import Tensor

from dmae_ds.config.family import prefix_of
from dmae_ds.config.run import OptimConfig
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.family import Family, FamilyBatch, with_sum
from dmae_ds.train.engine import Engine
from dmae_ds.train.optim import build_optimizer

if TYPE_CHECKING:
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine


def build_engine(
    objective: Objective, optim: OptimConfig, deepspeed: dict, device: torch.device
) -> Engine | FamilyEngine:
    """Build the engine of an objective, or of each member of a family."""

    def build(one: Objective) -> Engine:
        return Engine(one, build_optimizer(one, optim), copy.deepcopy(deepspeed), device)

    if not isinstance(objective, Family):
        return build(objective)
    return FamilyEngine(objective, {name: build(one) for name, one in objective.members().items()})


def members_of_engine(engine: Engine | FamilyEngine) -> dict[str, Engine]:
    """Engines by the names of the students; "" of a run with one."""
    return engine.engines if isinstance(engine, FamilyEngine) else {"": engine}


class FamilyEngine:
    """Engines of all members by name, with the interface of one `Engine`, whose methods it has."""

    def __init__(self, objective: Family, engines: dict[str, Engine]):
        self.objective, self.engines = objective, engines
        first = next(iter(engines.values()))
        self.device, self.stage = first.device, first.stage

    def set_lr(self, lr: float) -> None:
        for engine in self.engines.values():
            engine.set_lr(lr)

    def train_micro_batch(
        self,
        batch: FamilyBatch,
        features: dict[str, Tensor],
        *,
        lap: Callable[[str], None] = lambda part: None,
    ) -> dict[str, Tensor]:
        inputs = self.objective.inputs_of(batch, features)
        return with_sum(
            {name: engine.train_micro_batch(*inputs[name], lap=lap) for name, engine in self.engines.items()}
        )

    def evaluate_micro_batch(self, batch: FamilyBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.objective.inputs_of(batch, features)
        return with_sum(
            {name: engine.evaluate_micro_batch(*inputs[name]) for name, engine in self.engines.items()}
        )

    def full_weights(self, *, on_every_rank: bool = False) -> dict[str, Tensor]:
        return {
            f"{prefix_of(name)}{key}": value
            for name, engine in self.engines.items()
            for key, value in engine.full_weights(on_every_rank=on_every_rank).items()
        }

    def save(self, folder: str, tag: str) -> SafeCheckpointEngine:
        return _joined([engine.save(f"{folder}/{tag}", name) for name, engine in self.engines.items()])

    def has_groups_of(self, checkpoint: Path) -> bool:
        return all(engine.has_groups_of(checkpoint / name) for name, engine in self.engines.items())

    def load(self, folder: str, tag: str) -> None:
        for name, engine in self.engines.items():
            engine.load(f"{folder}/{tag}", name)

    def load_resharded(self, checkpoint: Path, *, stage: int, step: int, global_batch: int) -> None:
        for name, engine in self.engines.items():
            engine.load_resharded(checkpoint / name, stage=stage, step=step, global_batch=global_batch)


def _joined(saves: Iterable[SafeCheckpointEngine]) -> SafeCheckpointEngine:
    """The first of several saves of this rank, with the files of all and the first problem."""
    first, *others = saves
    for other in others:
        first.written |= other.written
        first.problem = first.problem or other.problem
    return first
