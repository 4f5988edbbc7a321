"""Saving and resuming: DeepSpeed's files, our state.json, and the student as one plain file in timm's names."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from safetensors import safe_open
from torch import Tensor

from dmae_ds.config.run import CheckpointConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed
from dmae_ds.output.durable import sync_folder, temporary_name, write_tensors
from dmae_ds.train.checkpoint.folder import CheckpointFolder, Written, crc32_of
from dmae_ds.train.engine import Engine

if TYPE_CHECKING:
    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine
    from dmae_ds.train.ema import EmaTeacher

PLAIN = ("student", "decoder")  # RUN/*.safetensors


class Checkpoints:
    """Saves of one run.

    identity: what makes it this run (`checkpoint_folder.MUST_AGREE`), with world_size, zero_stage and linear (train/kernels.py); stored with every save
    student_metadata: strings that go into student.safetensors; EMA teacher: saved and restored with everything else
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        *,
        identity: dict,
        student_metadata: dict[str, str],
        ema: EmaTeacher | None = None,
    ):
        self.folder, self.config = folder, config
        self.identity, self.student_metadata, self.ema = identity, student_metadata, ema
        self._last_save_s = time.monotonic()
        self._last_step: int | None = None  # saved or loaded

    def due_by_steps(self, step: int) -> bool:
        """Whether a step is one of those to save: the same answer on every rank."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether this rank's clock says so; ranks may differ, so only rank 0 is to be heard."""
        return (
            self.config.every_minutes is not None
            and time.monotonic() - self._last_save_s > 60 * self.config.every_minutes
        )

    def save(self, engine: Engine, *, step: int, position: int) -> None:
        """Save everything at a step; nothing to do at a step that is saved already. Collective.

        Raises RunFailed on every rank when the disk of one refused; what was saved before is untouched.
        """
        if step == self._last_step:
            return
        started = time.perf_counter()
        self._give_up_if(self._main_does(lambda: self.folder.begin(step)), step)
        files = engine.save(str(self.folder.path), self.folder.tag(step))
        weights = engine.full_weights()
        if collectives.is_main():
            for path, tensors in self._plain_files(weights).items():
                files.attempt(
                    lambda: save_plain(path, tensors, {**self.student_metadata, "step": str(step)}), path
                )
            if self.ema is not None:
                self.ema.save(self.folder.path / self.folder.tag(step), files)
        found = collectives.gather_objects((socket.gethostname(), files.problem, self._relative(files, step)))
        problems = [
            f"rank {rank} ({host}) {problem}"
            for rank, (host, problem, _) in enumerate(found)
            if problem is not None
        ]
        self._give_up_if(problems[0] if problems else None, step)
        written = {name: file for _, _, part in found for name, file in part.items()}
        state = {
            "step": step,
            "position": position,
            **self.identity,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self._give_up_if(self._main_does(lambda: self.folder.commit(step, state, written)), step)
        self._last_save_s, self._last_step = time.monotonic(), step
        problem = self._main_does(self._finish)
        if problem is not None:
            raise self._failed(
                f"step {step} is saved, but what came before it could not be cleared away: {problem}"
            )

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Restore a save that preflight found fit for this run; returns its step. Collective.

        One that another world size wrote, or another ZeRO stage, is moved. Raises UserError on every rank when a file is damaged.
        """
        collectives.raise_on_all_ranks(
            lambda: self.folder.check_bytes(
                checkpoint, part=collectives.rank(), parts=collectives.world_size()
            )
        )
        state = self.folder.read_state(checkpoint)
        step = state["step"]
        if self.folder.moves(state, self.identity):
            engine.load_moved(
                checkpoint, stage=state["zero_stage"], step=step, global_batch=self.identity["global_batch"]
            )
            if collectives.is_main():
                was, now = (
                    f"{of['world_size']} ranks, ZeRO stage {of['zero_stage']}"
                    for of in (state, self.identity)
                )
                print(
                    f"checkpoint {checkpoint.name} moved: written by {was}; this run has {now}",
                    file=sys.stderr,
                    flush=True,
                )
        else:
            engine.load(str(self.folder.path), checkpoint.name)
        if self.ema is not None:
            collectives.raise_on_all_ranks(lambda: self.ema.load(checkpoint))
        self._mend_plain_files(engine, step)
        self._last_step = step
        return step

    def _mend_plain_files(self, engine: Engine, step: int) -> None:
        """Write them anew where a kill left those of another step than `latest` names."""
        if collectives.broadcast_from_main(all(step_of(path) == step for path in self._plain_files({}))):
            return
        weights = engine.full_weights()

        def write() -> None:
            for path, tensors in self._plain_files(weights).items():
                save_plain(path, tensors, {**self.student_metadata, "step": str(step)})
                os.replace(temporary_name(path), path)

        problem = self._main_does(write)
        if problem is not None:
            raise self._failed(f"the plain files of step {step} could not be written: {problem}")

    def _finish(self) -> None:
        """After the pointer has moved: the plain files get their names, old checkpoints go."""
        for path in self._plain_files({}):
            os.replace(temporary_name(path), path)
        sync_folder(self.folder.run_dir)
        self.folder.prune(self.config.keep)

    def _plain_files(self, weights: dict[str, Tensor]) -> dict[Path, dict[str, Tensor]]:
        """RUN/student.safetensors loads into timm strictly; RUN/decoder.safetensors holds what else was trained."""
        student = {
            name.removeprefix("student."): tensor
            for name, tensor in weights.items()
            if name.startswith("student.")
        }
        rest = {name: tensor for name, tensor in weights.items() if not name.startswith("student.")}
        return {
            self.folder.run_dir / f"{name}.safetensors": tensors
            for name, tensors in zip(PLAIN, (student, rest), strict=True)
        }

    def _relative(self, files: SafeCheckpointEngine, step: int) -> dict:
        folder = self.folder.path / self.folder.tag(step)
        copied = (folder / "offloaded_tensors" / f"rank{collectives.rank():02d}").rglob(
            "*"
        )  # from NVMe, by DeepSpeed itself
        written = files.written | {
            path: Written(path.stat().st_size, crc32_of(path)) for path in copied if path.is_file()
        }
        return {str(path.relative_to(folder)): file for path, file in written.items()}

    def _main_does(self, action: Callable[[], None]) -> str | None:
        """Let rank 0 do something on the disk; every rank hears what went wrong, or None. Collective."""
        problem = None
        if collectives.is_main():
            try:
                action()
            except (OSError, RunFailed) as error:
                problem = f"rank 0 ({socket.gethostname()}) {error}"
        return collectives.broadcast_from_main(problem)

    def _give_up_if(self, problem: str | None, step: int) -> None:
        """Where there is a problem, throw the half-made save away and raise the same RunFailed on every rank. Collective."""
        if problem is None:
            return
        free = []

        def tidy() -> None:
            free.append(f"{shutil.disk_usage(self.folder.path).free / 2**20:,.1f} MiB were free; ")
            self.folder.abandon(step)
            for path in self._plain_files({}):
                temporary_name(path).unlink(missing_ok=True)

        untidy = self._main_does(tidy)
        left = "" if untidy is None else f"what it had written is still there ({untidy}); "
        before = (
            f"{self.folder.tag(self._last_step)} is untouched"
            if self._last_step is not None
            else "nothing was saved before"
        )
        raise self._failed(
            collectives.broadcast_from_main(
                f"step {step} could not be saved: {problem}; {''.join(free)}{left}{before}; make room and continue with --resume auto"
            )
        )

    def _failed(self, message: str) -> RunFailed:
        error = RunFailed(message)
        error.on_every_rank = True
        return error


def save_plain(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file to the disk, under its temporary name. Raises OSError."""
    write_tensors(temporary_name(path), tensors, metadata)


def step_of(path: Path) -> int | None:
    """The step that a plain file is of; None when it is missing or broken."""
    try:
        with safe_open(path, "pt") as file:
            return int(file.metadata()["step"])
    except Exception:  # safetensors has one class for everything; whatever it is, the file is written anew
        return None
