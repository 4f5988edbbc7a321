"""EMA teacher of a run: a full fp32 copy of some modules of the objective on every rank, outside the engine.

It is updated from the engine's full fp32 weights one tensor at a time, so that under ZeRO-3 at most one
parameter is gathered. Every rank computes the same update, so nothing is sent for it. Its buffers
(positional embeddings, frozen projections) are constants, as the engine's are. What an objective asks for
is in objectives/needs.py (`EmaSpec`); how the EMA teacher is stored is in checkpoint/ema_file.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress

if TYPE_CHECKING:
    from dmae_ds.train.engine import Engine


def build_ema_teacher(
    objective: Objective, *, precision: str, device: torch.device
) -> EmaTeacher | NoEmaTeacher:
    """Build the EMA teacher that an objective asks for, or one that does nothing.

    Call it before an engine flattens the objective's weights and before hooks are registered on its modules.
    """
    if objective.ema is None:
        return NoEmaTeacher(objective)
    return EmaTeacher(objective, precision=precision, device=device)


class EmaTeacher:
    """EMA teacher of one run; `module` holds its weights.

    precision: the recipe's, used for its matrix products
    """

    def __init__(self, objective: Objective, *, precision: str, device: torch.device):
        self.objective, self.precision, self.device = objective, precision, device
        self.module = EmaModule(objective).to(device)
        self.module.state = {name: tensor.to(device) for name, tensor in self.module.state.items()}

    def __str__(self) -> str:
        spec = self.objective.ema
        millions = sum(parameter.numel() for parameter in self.module.parameters()) / 1e6
        size = f"{', '.join(spec.parts)}, {millions:.1f} M parameters in fp32 on every rank"
        if spec.every == "never":
            return f"frozen copy of the initial {size}"
        return f"EMA of {size}, updated every {spec.every}"

    def features(self, masked: PatchBatch) -> dict[str, Tensor]:
        """Compute the EMA teacher's features of a micro-batch; their names begin with "ema/"."""
        return ema_features(self.objective, self.module, masked, precision=self.precision)

    def after_step(self, engine: Engine, progress: Progress, following: Progress) -> None:
        """Update the EMA teacher after the optimizer step of `progress`, if it is due. Collective.

        following: the progress of the next step, which shows whether an epoch has ended
        """
        every = self.objective.ema.every
        if every == "never" or (every == "epoch" and int(following.epoch) == int(progress.epoch)):
            return
        self.update(engine, self.objective.ema.momentum(progress))

    @torch.no_grad()
    def update(self, engine: Engine, momentum: float) -> None:
        """Compute ema = momentum * ema + (1 - momentum) * student, one tensor at a time. Collective."""
        averages = dict(self.module.named_parameters())
        for name, full in engine.full_parameters(self.objective.ema.parts):
            full = full.to(self.device, non_blocking=True)
            averages.pop(name).mul_(momentum).add_(full, alpha=1 - momentum)
        assert not averages, f"the engine has no {', '.join(averages)}"

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Take the objective's constants, which a checkpoint has brought."""
        for name, buffer in self.module.named_buffers():
            buffer.copy_(self.objective.get_buffer(name))

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps: parameters by their names in the objective, and state/<name>.

        With memory/<name> of `Objective.memory`.
        """
        state = {f"state/{name}": tensor for name, tensor in self.module.state.items()}
        return {**dict(self.module.named_parameters()), **state, **memory_of(self.objective)}


class NoEmaTeacher:
    """Null object for an objective without an EMA teacher: no weights, no features, no updates.

    objective: whose `memory` a checkpoint keeps all the same; None: none
    """

    def __init__(self, objective: Objective | None = None):
        self.objective, self.module = objective, nn.Module()

    def __str__(self) -> str:
        return ""

    def features(self, masked: PatchBatch) -> dict[str, Tensor]:
        """Return no features."""
        return {}

    def after_step(self, engine: Engine, progress: Progress, following: Progress) -> None:
        """Do nothing."""

    def update(self, engine: Engine, momentum: float) -> None:
        """Do nothing."""

    def copy_buffers(self) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the objective's memory; without one, a checkpoint has no file of it."""
        return {} if self.objective is None else memory_of(self.objective)


def memory_of(objective: Objective) -> dict[str, Tensor]:
    """Return the tensors of `Objective.memory` under the names that a checkpoint has for them."""
    return {f"memory/{name}": tensor for name, tensor in objective.memory().items()}
