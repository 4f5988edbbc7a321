"""Bytes and seconds of a checkpoint, against the bytes that must be kept and a plain write of as many.

    deepspeed --num_gpus 2 --module dmae_ds bench save RECIPE [key=value] [--steps 3] [--rounds 5] [--folder
    F]

The recipe gives the trained networks, the DeepSpeed file, the micro-batch and how often a run saves; weights,
pixels and the teacher's features are random, and no teacher computes, so a real step is longer and the share
of saving smaller. Steps, saves and plain writes (all ranks write their part of the bytes at the same time, to
the disk) take turns. Seconds belong to one disk; ratios and bytes are what to look at.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.bench.random_batch import random_batches
from dmae_ds.bench.random_teacher import check_one_teacher
from dmae_ds.config.batch import BatchSplit
from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.config.family import check_one_student
from dmae_ds.config.run import CheckpointConfig, RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.needs import Progress
from dmae_ds.output.units import MIB
from dmae_ds.train.checkpoint.folder import CheckpointFolder, bytes_in
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.checkpoint.student_file import NAMES
from dmae_ds.train.cut import CutRecipe
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher, build_ema_teacher
from dmae_ds.train.engine import Engine, check_precision
from dmae_ds.train.forecast import resolve_micro_batch
from dmae_ds.train.optim import build_optimizer
from dmae_ds.train.speed import wait_for

STATE_BYTES = 12  # a parameter: the weight and AdamW's two moments in fp32
PLAIN_BYTES = 4  # the plain files hold the weight once more


@dataclass
class _Run:
    """What saves: an engine with its checkpoints, and batches to step on."""

    engine: Engine
    checkpoints: Checkpoints
    ema: EmaTeacher | NoEmaTeacher
    batches: list[PatchBatch]
    features: dict[str, Tensor]
    split: BatchSplit
    num_parameters: int
    device: torch.device

    def take_steps(self, count: int) -> None:
        for number in range(count * self.split.accumulation):
            batch = self.batches[number % len(self.batches)]
            self.engine.train_micro_batch(batch, self.features | self.ema.features(batch))
        self.ema.update(self.engine, 0.99)
        wait_for(self.device)

    def saved_bytes(self) -> tuple[int, int]:
        """Bytes in DeepSpeed's files of the newest checkpoint, and in the plain ones."""
        folder = self.checkpoints.folder
        plain = [folder.run_dir / name for name in NAMES]
        return bytes_in(folder.latest()), sum(path.stat().st_size for path in plain)


@dataclass(frozen=True)
class _Result:
    """Medians of the rounds in seconds, and bytes."""

    step_s: float
    save_s: float
    write_s: float
    deepspeed_bytes: int
    plain_bytes: int


def bench_save(config: RunConfig, world: World, *, steps: int, rounds: int, folder: Path | None) -> str:
    """Measure and return the text, to print on rank 0. Collective; makes the process group.

    steps: optimiser steps in a round
    folder: a folder on the disk that is to be measured, in which nothing stays; None: the system's temporary
      one
    Raises UserError for a recipe that can't be built, and for one of several students.
    """
    check_one_student(config, "bench save")
    with (
        process_group.joined(world, timeout_s=config.dist.timeout_s) as device,
        tempfile.TemporaryDirectory(dir=folder) as temporary,
    ):
        run_dir = Path(collectives.broadcast_from_main(temporary))
        run = _build(config, world, run_dir, device)
        result = _measure(run, world, steps=steps, rounds=rounds)
        collectives.barrier()  # before the folder is removed
    micro_batch, accumulation = run.split
    title = (
        f"{config.student.name}, {run.num_parameters / 1e6:.1f} M trained parameters, {config.deepspeed}, "
        f"{config.precision}; {world.size} ranks x {micro_batch} x {accumulation} images; {device.type}; "
        f"median of {rounds} rounds"
    )
    return "\n".join([title, "", *_report(config, result, run.num_parameters)])


def _build(config: RunConfig, world: World, run_dir: Path, device: torch.device) -> _Run:
    check_precision(config.precision, device)
    cut, _ = resolve_micro_batch(CutRecipe.of(config, world), device)
    config, split, deepspeed = cut.config, cut.split, cut.deepspeed
    check_one_teacher(config, "save")
    objective, shapes = build_objective(config)
    if any(not tap.startswith("block/") for tap in objective.taps):
        raise UserError(
            f"bench save makes random features of encoder blocks only, but the objective taps "
            f"{', '.join(objective.taps)}; use a recipe of another objective"
        )
    ema = build_ema_teacher(objective, precision=config.precision, device=device)
    objective.start_step(Progress(0, 1, 0.0, config.optim.epochs))
    num_parameters = sum(parameter.numel() for parameter in objective.parameters())
    batches = random_batches(objective, config, micro_batch=split.micro_batch, rank=world.rank, device=device)
    # What the student compares itself with: CLS and its own visible patches, whatever the teacher sees.
    num_images, num_visible = batches[0].ids_keep.shape
    features = {
        tap: torch.randn(num_images, 1 + num_visible, shapes[""].embed_dim, device=device)
        for tap in objective.taps
    }
    engine = Engine(objective, build_optimizer(objective, config.optim), deepspeed, device)
    engine.set_lr(1e-5)
    identity = {
        "world_size": world.size,
        "zero_stage": zero_stage(deepspeed),
        "precision": config.precision,
        "global_batch": config.optim.global_batch,
    }
    checkpoints = Checkpoints(
        CheckpointFolder(run_dir),
        config.checkpoint.model_copy(update={"keep": 1}),
        identity=identity,
        student_metadata={"": {"format": "pt"}},
        ema=ema,
    )
    return _Run(engine, checkpoints, ema, batches, features, split, num_parameters, device)


def _measure(run: _Run, world: World, *, steps: int, rounds: int) -> _Result:
    run.take_steps(steps)  # allocates, and makes the moments
    times: dict[str, list[float]] = {"step": [], "save": [], "write": []}
    path = run.checkpoints.folder.run_dir / f"write-{world.rank}"
    for number in range(1, rounds + 1):
        times["step"].append(_time(lambda: run.take_steps(steps)) / steps)
        times["save"].append(
            _time(lambda number=number: run.checkpoints.save(run.engine, step=number, position=number))
        )
        saved = run.saved_bytes()
        share = sum(saved) // world.size
        times["write"].append(_time(lambda share=share: _write(path, share)))
    medians = (statistics.median(times[name]) for name in ("step", "save", "write"))
    return _Result(*medians, *saved)


def _report(config: RunConfig, result: _Result, num_parameters: int) -> list[str]:
    total = result.deepspeed_bytes + result.plain_bytes
    needed = (STATE_BYTES + PLAIN_BYTES) * num_parameters
    without = "" if config.teacher is None else " without its teacher"
    return [
        f"bytes   {total / MIB:.1f} MiB = {result.deepspeed_bytes / MIB:.1f} in DeepSpeed's files + "
        f"{result.plain_bytes / MIB:.1f} in the plain ones; {total / needed:.3f} of the {needed / MIB:.1f} "
        "that must be "
        "kept (weights and two moments in fp32, and the weights as plain files)",
        f"seconds {result.save_s:.3f} a save, {result.write_s:.3f} for a plain write of as many bytes by "
        "the same ranks: "
        f"{result.save_s / result.write_s:.2f}",
        f"share   a step takes {result.step_s:.3f} s{without}, so a save is "
        f"{result.save_s / result.step_s:.2f} steps; "
        f"{_share_of_run(config.checkpoint, result)}",
    ]


def _share_of_run(checkpoint: CheckpointConfig, result: _Result) -> str:
    shares = []
    if checkpoint.every_minutes is not None:
        share = result.save_s / (result.save_s + 60 * checkpoint.every_minutes)
        shares.append(f"every {checkpoint.every_minutes:g} minutes that is {share:.3%} of a run's time")
    if checkpoint.every_steps is not None:
        share = result.save_s / (result.save_s + checkpoint.every_steps * result.step_s)
        shares.append(f"every {checkpoint.every_steps} steps that is {share:.3%} of a run's time")
    return ", ".join(shares) or "the recipe saves only at its end"


def _time(action: Callable[[], object]) -> float:
    """Seconds until all ranks have done it."""
    collectives.barrier()
    since = time.perf_counter()
    action()
    collectives.barrier()
    return time.perf_counter() - since


def _write(path: Path, size: int) -> None:
    """Write so many bytes to the disk, and remove them again."""
    block = os.urandom(MIB)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    path.unlink()
