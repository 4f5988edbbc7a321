"""Saving and resuming: DeepSpeed's files, our state.json, and the student as one plain file in timm's names."""

from __future__ import annotations

import os
import time
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dmae_ds import dist
from dmae_ds.config.run import CheckpointConfig
from dmae_ds.train.checkpoint_folder import CheckpointFolder
from dmae_ds.train.engine import Engine


class Checkpoints:
    """Saves of one run.

    identity: what makes it this run (`checkpoint_folder.MUST_AGREE`), stored with every save
    student_metadata: strings that go into student.safetensors
    """

    def __init__(self, folder: CheckpointFolder, config: CheckpointConfig, *, identity: dict, student_metadata: dict[str, str]):
        self.folder, self.config = folder, config
        self.identity, self.student_metadata = identity, student_metadata
        self._last_save_s = time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        """Whether a step is one of those to save: the same answer on every rank."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether this rank's clock says so; ranks may differ, so only rank 0 is to be heard."""
        return self.config.every_minutes is not None and time.monotonic() - self._last_save_s > 60 * self.config.every_minutes

    def save(self, engine: Engine, *, step: int, position: int) -> None:
        """Save everything at a step. Collective."""
        if dist.is_main():
            self.folder.begin(step)
        dist.barrier()
        engine.save(str(self.folder.path), self.folder.tag(step))
        weights = engine.full_weights()
        dist.barrier()
        if dist.is_main():
            self._write_plain_files(weights, step)
            self.folder.commit(step, {"step": step, "position": position, **self.identity}, keep=self.config.keep)
        dist.barrier()
        self._last_save_s = time.monotonic()

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Restore a save that preflight found fit for this run; returns its step. Collective."""
        engine.load(str(self.folder.path), checkpoint.name)
        return self.folder.read_state(checkpoint)["step"]

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
