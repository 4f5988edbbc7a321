"""An objective's EMA teacher (objectives/needs.py): a whole fp32 copy of some of its parts on every rank, outside the engine.

Updated from the engine's full fp32 weights a tensor at a time, so that under ZeRO-3 never more than one parameter is gathered.
Every rank computes the same update, so nothing is sent for it; rank 0 writes the EMA teacher into the checkpoint, as safetensors.
Its buffers (position codes, frozen projections) are constants, as the engine's are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress
from dmae_ds.output.durable import write_tensors
from dmae_ds.train.checkpoint.folder import Written, crc32_of

if TYPE_CHECKING:
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine
    from dmae_ds.train.engine import Engine

FILE = "ema.safetensors"  # in a checkpoint
OLD_FILE = "twin.safetensors"  # its name until November 2026


class EmaTeacher:
    """The EMA teacher of one run; `module` holds the weights.

    precision: the recipe's
    """

    def __init__(self, objective: Objective, *, precision: str, device: torch.device):
        self.objective, self.precision, self.device = objective, precision, device
        self.module = EmaModule(objective).to(device)
        self.module.state = {name: tensor.to(device) for name, tensor in self.module.state.items()}

    def __str__(self) -> str:
        number = sum(parameter.numel() for parameter in self.module.parameters())
        return f"EMA of {', '.join(self.objective.ema.parts)}, {number / 1e6:.1f} M parameters in fp32 on every rank, updated every {self.objective.ema.every}"

    def features(self, masked: PatchBatch) -> dict[str, Tensor]:
        """What the objective wants of its EMA teacher for a micro-batch; names begin with "ema/"."""
        return ema_features(self.objective, self.module, masked, precision=self.precision)

    def after_step(self, engine: Engine, progress: Progress, following: Progress) -> None:
        """After the optimiser's step of `progress`, where the EMA teacher follows it. Collective.

        following: the progress of the step after it, which says whether an epoch has ended
        """
        if self.objective.ema.every == "epoch" and int(following.epoch) == int(progress.epoch):
            return
        self.update(engine, self.objective.ema.momentum(progress))

    @torch.no_grad()
    def update(self, engine: Engine, momentum: float) -> None:
        """ema = m * ema + (1 - momentum) * student, a tensor at a time. Collective."""
        own = dict(self.module.named_parameters())
        for name, full in engine.full_parameters(self.objective.ema.parts):
            own.pop(name).mul_(momentum).add_(full.to(self.device, non_blocking=True), alpha=1 - momentum)
        assert not own, f"the engine has no {', '.join(own)}"

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that is kept: parameters by their names in the objective, and state/<name>."""
        yield from self.module.named_parameters()
        yield from ((f"state/{name}", tensor) for name, tensor in self.module.state.items())

    def save(self, folder: Path, files: SafeCheckpointEngine) -> None:
        """Write FILE into a checkpoint's folder, to the disk; call it on rank 0 alone. What a disk refuses is in `files.problem`."""
        path = folder / FILE

        def write() -> None:
            write_tensors(path, {name: tensor.detach().cpu() for name, tensor in self.tensors()})
            files.written[path] = Written(path.stat().st_size, crc32_of(path))

        files.attempt(write, path)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on every rank. Raises UserError where it isn't there, or is of another EMA teacher."""
        path = folder / FILE
        if not path.is_file():
            path = folder / OLD_FILE
        if not path.is_file():
            raise UserError(
                f"checkpoint '{folder}' has no {FILE}, the objective's EMA teacher; it is not of this run"
            )
        found, own = load_file(path), dict(self.tensors())
        wrong = {
            name
            for name in found.keys() | own.keys()
            if name not in found or name not in own or found[name].shape != own[name].shape
        }
        if wrong:
            raise UserError(
                f"{path} is of another EMA teacher: {', '.join(sorted(wrong)[:4])} ({len(wrong)} tensors) differ; it is not of this run"
            )
        for name, tensor in own.items():
            tensor.copy_(found[name])
