"""Saving and resuming: DeepSpeed's files, our state.json, and the student as one plain file in timm's names."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dmae_ds import dist
from dmae_ds.config.run import CheckpointConfig
from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint_folder import CheckpointFolder
from dmae_ds.train.engine import Engine

# What must be equal for a checkpoint's weights and position to mean the same thing.
_FIXED = ("world_size", "zero_stage", "seed", "fingerprint", "student", "objective", "precision")
_WAY_OUT = {
    "world_size": "start with as many ranks as wrote it",
    "zero_stage": "use the DeepSpeed file of the same ZeRO stage",
    "seed": "set run.seed back",
    "fingerprint": "point data.train at the shards that it was trained on",
    "student": "set the student's section back, or choose another run.dir",
    "objective": "set the objective's section back, or choose another run.dir",
    "precision": "set precision back",
}


class Checkpoints:
    """Saves of one run.

    constant: the values of `_FIXED`, stored with every save and held against at resume
    student_metadata: strings that go into student.safetensors
    """

    def __init__(self, folder: CheckpointFolder, config: CheckpointConfig, *, constant: dict, student_metadata: dict[str, str]):
        assert set(constant) == set(_FIXED)
        self.folder, self.config = folder, config
        self.constant, self.student_metadata = constant, student_metadata
        self._last_save_s = time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        """Whether a step is one of those to save: the same answer on every rank."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether this rank's clock says so; ranks may differ, so only rank 0 is to be heard."""
        return self.config.every_minutes is not None and time.monotonic() - self._last_save_s > 60 * self.config.every_minutes

    def save(self, engine: Engine, *, step: int, position: int) -> None:
        """Save everything at a step. Collective."""
        world_rank = torch.distributed.get_rank()
        if world_rank == 0:
            self.folder.begin(step)
        dist.barrier()
        engine.save(str(self.folder.path), self.folder.tag(step))
        weights = engine.full_weights()
        dist.barrier()
        if world_rank == 0:
            self._write_plain_files(weights, step)
            self.folder.commit(step, {"step": step, "position": position, **self.constant}, keep=self.config.keep)
        dist.barrier()
        self._last_save_s = time.monotonic()

    def load(self, engine: Engine, checkpoint: Path) -> tuple[int, int]:
        """Restore a save; returns (step, position). Collective. Raises UserError where it belongs to another run."""
        state = self.folder.read_state(checkpoint)
        for key in _FIXED:
            if state[key] != self.constant[key]:
                raise UserError(f"checkpoint '{checkpoint}' has {key} {_short(state[key])}, this run {_short(self.constant[key])}; {_WAY_OUT[key]}")
        engine.load(str(self.folder.path), checkpoint.name)
        return state["step"], state["position"]

    def _write_plain_files(self, weights: dict[str, Tensor], step: int) -> None:
        """RUN/student.safetensors loads into timm strictly; RUN/decoder.safetensors holds what else was trained."""
        student = {name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")}
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith("student.")}
        for name, tensors in (("student", student), ("decoder", rest)):
            path = self.folder.run_dir / f"{name}.safetensors"
            temporary = path.with_name(path.name + ".tmp")
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, metadata={**self.student_metadata, "step": str(step)})
            with open(temporary, "rb") as file:
                os.fchmod(file.fileno(), 0o644)  # safetensors makes it private to the user
                os.fsync(file.fileno())
            os.replace(temporary, path)


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
