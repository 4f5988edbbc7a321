"""Saving and resuming a run: DeepSpeed's files, our state.json, the EMA teacher and the exported student.

A save is complete on every rank or deleted on every rank: rank 0 makes the folder, every rank
writes its files, rank 0 writes state.json and moves the pointer `latest` (folder.py), then the exported
student gets its names.
"""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Callable

from dmae_ds.config.run import CheckpointConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed
from dmae_ds.output.lines import say
from dmae_ds.output.units import MIB, size_text
from dmae_ds.train.checkpoint.ema_file import load_ema, save_ema
from dmae_ds.train.checkpoint.folder import TEACHER_WEIGHTS, CheckpointFolder, Written, crc32_of
from dmae_ds.train.checkpoint.student_file import StudentFiles
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher
from dmae_ds.train.engine import Engine

if TYPE_CHECKING:
    from torch import Tensor

    from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine


# A new run's first save comes early: it shows that the disk takes it, and an early stop loses little.
FIRST_MINUTES = 5.0


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    identity: what makes it this run (`folder.MUST_AGREE`), with world_size, zero_stage and linear; in every
        state.json
    student_metadata: {name of a student, "" of the only one: strings that go into student.safetensors}
    ema: saved and restored with everything else
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: CheckpointConfig,
        *,
        identity: dict,
        student_metadata: dict[str, dict[str, str]],
        ema: EmaTeacher | NoEmaTeacher,
    ):
        self.folder, self.config = folder, config
        self.identity, self.ema = identity, ema
        self.student_files = StudentFiles(folder.run_dir, student_metadata)
        self._last_save_s = time.monotonic()
        self._last_step: int | None = None  # saved or loaded

    def due_by_steps(self, step: int) -> bool:
        """Whether checkpoint.every_steps asks for a save at a step: the same answer on every rank."""
        return self.config.every_steps is not None and step % self.config.every_steps == 0

    def due_by_time(self) -> bool:
        """Whether checkpoint.every_minutes have passed here; clocks of ranks differ, so rank 0 decides."""
        minutes = self.config.every_minutes
        if minutes is not None and self._last_step is None:
            minutes = min(minutes, FIRST_MINUTES)
        return minutes is not None and time.monotonic() - self._last_save_s > 60 * minutes

    def save(self, engine: Engine, *, step: int, position: int) -> None:
        """Save everything at a step, unless that step is saved already. Collective.

        Raises RunFailed on every rank when weights are not finite or the disk of one rank refused; earlier
        checkpoints are untouched.
        """
        if step == self._last_step:
            return
        started = time.perf_counter()
        weights = engine.full_weights()
        self._raise_unless_finite(weights, step)
        self._abort_if(self._on_main(lambda: self.folder.begin(step)), step)
        files = engine.save(str(self.folder.path), self.folder.tag(step))
        if collectives.is_main():
            self.student_files.write(weights, step, attempt=files.attempt)
            save_ema(self.ema.tensors(), self.folder.path / self.folder.tag(step), files)
        written = self._gather_written(files, step)
        seconds = round(time.perf_counter() - started, 3)
        state = {"step": step, "position": position, **self.identity, "seconds": seconds}
        self._abort_if(self._on_main(lambda: self.folder.commit(step, state, written)), step)
        self._last_save_s, self._last_step = time.monotonic(), step
        if collectives.is_main():
            spent, num_bytes = time.perf_counter() - started, sum(file.bytes for file in written.values())
            say(f"saved {self.folder.tag(step)} in {spent:.1f} s, {size_text(num_bytes)}")
        problem = self._on_main(self._publish_and_prune)
        if problem is not None:
            raise _failure(
                f"step {step} is saved, but the files of earlier steps could not be replaced: {problem}"
            )

    def load(self, engine: Engine, checkpoint: Path) -> int:
        """Restore a save that preflight accepted for this run; returns its step. Collective.

        A checkpoint of another world size, ZeRO stage or parameter groups is resharded. Raises UserError on
        every rank when a file is damaged.
        """
        rank, world_size = collectives.rank(), collectives.world_size()
        collectives.raise_on_all_ranks(
            lambda: self.folder.check_bytes(checkpoint, part=rank, parts=world_size)
        )
        state = self.folder.read_state(checkpoint)
        step = state["step"]
        # Also of weights that are not here now, because their features are stored.
        weights = {**state.get(TEACHER_WEIGHTS, {}), **self.identity.get(TEACHER_WEIGHTS, {})}
        self.identity = {**self.identity, TEACHER_WEIGHTS: weights}
        same_groups = collectives.raise_on_all_ranks(lambda: self._has_groups_of(engine, checkpoint))
        if self.folder.must_reshard(state, self.identity) or not same_groups:
            engine.load_resharded(
                checkpoint,
                stage=state["zero_stage"],
                step=step,
                global_batch=self.identity["global_batch"],
            )
            if collectives.is_main():
                groups = "" if same_groups else "; optim.weight_decay or layer_decay form other groups"
                say(
                    f"checkpoint {checkpoint.name} resharded: written by {_layout(state)}; "
                    f"this run has {_layout(self.identity)}{groups}"
                )
        else:
            engine.load(str(self.folder.path), checkpoint.name)
        collectives.raise_on_all_ranks(lambda: load_ema(self.ema.tensors(), checkpoint))
        self.ema.copy_buffers()
        self._restore_student_files(engine, step)
        self._last_step = step
        return step

    def _has_groups_of(self, engine: Engine, checkpoint: Path) -> bool:
        """Whether the optimizer has the checkpoint's parameter groups; raises UserError where it must."""
        same = engine.has_groups_of(checkpoint)
        if not same:
            self.folder.check_can_reshard(checkpoint, self.identity)
        return same

    def _raise_unless_finite(self, weights: dict[str, Tensor], step: int) -> None:
        """Raise RunFailed, on every rank, for weights that are not finite. weights: on rank 0. Collective."""
        tensors = {**weights, **(self.ema.tensors() if collectives.is_main() else {})}
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        text = None
        if broken:
            text = (
                f"step {step} is not saved: {len(broken)} of {len(tensors)} tensors are not finite after its "
                f"update (the first: {broken[0]}); {self.folder.ways_on()}"
            )
        text = collectives.broadcast_from_main(text)
        if text is not None:
            raise _failure(text)

    def _restore_student_files(self, engine: Engine, step: int) -> None:
        """Rewrite the exported student where a kill left that of another step than `latest`. Collective."""
        if collectives.broadcast_from_main(self.student_files.are_of(step)):
            return
        weights = engine.full_weights()

        def write() -> None:
            self.student_files.write(weights, step)
            self.student_files.publish()

        problem = self._on_main(write)
        if problem is not None:
            raise _failure(f"the exported student of step {step} could not be written: {problem}")

    def _publish_and_prune(self) -> None:
        self.student_files.publish()
        self.folder.prune(self.config.keep)

    def _gather_written(self, files: SafeCheckpointEngine, step: int) -> dict[str, Written]:
        """Collect the sizes and checksums of all ranks' files; a rank's problem aborts the save. Collective.

        Returns {path in the checkpoint: Written}.
        """
        mine = (socket.gethostname(), files.problem, self._written_here(files, step))
        written: dict[str, Written] = {}
        problems = []
        for rank, (host, problem, of_rank) in enumerate(collectives.gather_objects(mine)):
            written |= of_rank
            if problem is not None:
                problems.append(f"rank {rank} ({host}) {problem}")
        self._abort_if(problems[0] if problems else None, step)
        return written

    def _written_here(self, files: SafeCheckpointEngine, step: int) -> dict[str, Written]:
        """{path in the checkpoint: Written} of this rank's files."""
        folder = self.folder.path / self.folder.tag(step)
        # Copied from NVMe by DeepSpeed itself, past SafeCheckpointEngine; of a family, a member's.
        offloaded = folder.rglob(f"offloaded_tensors/rank{collectives.rank():02d}/**/*")
        copied = {path: Written(path.stat().st_size, crc32_of(path)) for path in offloaded if path.is_file()}
        return {str(path.relative_to(folder)): file for path, file in (files.written | copied).items()}

    def _on_main(self, action: Callable[[], None]) -> str | None:
        """Let rank 0 do something on the disk; returns on every rank what went wrong, or None. Collective."""
        problem = None
        if collectives.is_main():
            try:
                action()
            except (OSError, RunFailed) as error:
                problem = f"rank 0 ({socket.gethostname()}) {error}"
        return collectives.broadcast_from_main(problem)

    def _abort_if(self, problem: str | None, step: int) -> None:
        """If there is a problem, delete the unfinished save and raise RunFailed on every rank. Collective."""
        if problem is None:
            return
        free_text = ""

        def clean_up() -> None:
            nonlocal free_text
            free_text = f"{shutil.disk_usage(self.folder.path).free / MIB:,.1f} MiB were free; "
            self.folder.abandon(step)
            self.student_files.discard()

        not_deleted = self._on_main(clean_up)
        left = "" if not_deleted is None else f"the unfinished files could not be deleted ({not_deleted}); "
        before = "no earlier checkpoint exists"
        if self._last_step is not None:
            before = f"{self.folder.tag(self._last_step)} is untouched"
        message = (
            f"step {step} could not be saved: {problem}; {free_text}{left}{before}; "
            "free some space and continue with --resume auto"
        )
        raise _failure(collectives.broadcast_from_main(message))


def _layout(identity: dict) -> str:
    return f"{identity['world_size']} ranks, ZeRO stage {identity['zero_stage']}"


def _failure(message: str) -> RunFailed:
    error = RunFailed(message)
    error.on_every_rank = True
    return error
