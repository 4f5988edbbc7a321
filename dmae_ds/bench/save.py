"""What a checkpoint costs: bytes and seconds of a save, against the bytes that must be kept and a plain write of as many.

    deepspeed --num_gpus 2 --module dmae_ds bench save RECIPE [key=value] [--steps 3] [--rounds 5] [--folder F]

The recipe gives the trained networks, the DeepSpeed file, the micro-batch and how often is saved; weights, pixels and the
teacher's features are random, and no teacher computes, so a real step is longer and the share of saving smaller. Steps,
saves and plain writes (every rank its part of the bytes at the same time, to the disk) take turns. Seconds belong to
one disk; ratios and bytes are what to look at.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable

import torch

from dmae_ds.bench.stream import MIB, random_batches, settle
from dmae_ds.config.batch import split_recipe
from dmae_ds.config.deepspeed import load_deepspeed, zero_stage
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.needs import Progress
from dmae_ds.train.checkpoint.folder import CheckpointFolder, bytes_in
from dmae_ds.train.checkpoint.save import PLAIN, Checkpoints
from dmae_ds.train.ema import EmaTeacher
from dmae_ds.train.engine import Engine, check_precision
from dmae_ds.train.optim import build_optimizer

KEPT = 12  # bytes a parameter: the weight and AdamW's two moments in fp32


def bench_save(config: RunConfig, world: World, *, steps: int, rounds: int, folder: Path | None) -> str:
    """Measure and return the text, to print on rank 0. Collective; the process group is made here.

    steps: optimiser steps in a round; folder: where to write, on the disk that is meant (default: a temporary folder), and nothing stays there
    Raises UserError for a recipe that can't be.
    """
    with (
        process_group.joined(world, timeout_s=config.dist.timeout_s) as device,
        tempfile.TemporaryDirectory(dir=folder) as mine,
    ):
        run_dir = Path(collectives.broadcast_from_main(mine))
        check_precision(config.precision, device)
        micro_batch, accumulation = split_recipe(config, world.size)
        deepspeed = load_deepspeed(
            config.deepspeed,
            micro_batch=micro_batch,
            accumulation=accumulation,
            world_size=world.size,
            clip_grad=config.optim.clip_grad,
            precision=config.precision,
        )
        objective, shape = build_objective(config)
        if any(not tap.startswith("block/") for tap in objective.taps):
            raise UserError(
                f"bench save makes up the features of encoder blocks alone, and the objective taps {', '.join(objective.taps)}; take a recipe of another objective"
            )
        ema = (
            None
            if objective.ema is None
            else EmaTeacher(objective, precision=config.precision, device=device)
        )
        objective.start_step(Progress(0, 1, 0.0, config.optim.epochs))
        num_parameters = sum(parameter.numel() for parameter in objective.parameters())
        batches = list(
            random_batches(objective, config, micro_batch=micro_batch, rank=world.rank, device=device)
        )
        sees = (
            objective.num_visible
            if config.teacher is None or config.teacher.sees == "visible"
            else objective.student.num_patches
        )
        features = {
            tap: torch.randn(micro_batch, 1 + sees, shape.embed_dim, device=device) for tap in objective.taps
        }
        engine = Engine(objective, build_optimizer(objective, config.optim), deepspeed, device)
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
            student_metadata={"format": "pt"},
            ema=ema,
        )
        engine.set_lr(1e-5)

        def step() -> None:
            for number in range(steps * accumulation):
                masked = batches[number % len(batches)]
                engine.train_micro_batch(masked, features if ema is None else features | ema.features(masked))
            if ema is not None:
                ema.update(engine, 0.99)
            settle()

        step()  # lets everybody allocate, and makes the moments
        times: dict[str, list[float]] = {"step": [], "save": [], "write": []}
        for number in range(1, rounds + 1):
            times["step"].append(_time(step) / steps)
            times["save"].append(_time(lambda: checkpoints.save(engine, step=number, position=number)))
            saved = {
                "parts": bytes_in(checkpoints.folder.latest()),
                "plain files": sum((run_dir / f"{name}.safetensors").stat().st_size for name in PLAIN),
            }
            share = sum(saved.values()) // world.size
            times["write"].append(_time(lambda: _write(run_dir / f"write-{world.rank}", share)))
        collectives.barrier()  # before the folder goes
    step_s, save_s, write_s = (statistics.median(times[name]) for name in ("step", "save", "write"))
    total, kept = (
        sum(saved.values()),
        (KEPT + 4) * num_parameters,
    )  # the plain files hold the weights once more
    alone = "" if config.teacher is None else " without its teacher"
    lines = [
        f"{config.student.name}, {num_parameters / 1e6:.1f} M trained parameters, {config.deepspeed}, {config.precision}; {world.size} ranks x {micro_batch} x {accumulation} images; "
        f"{device.type}; median of {rounds} rounds",
        "",
        f"bytes   {total / MIB:.1f} MiB = {saved['parts'] / MIB:.1f} in DeepSpeed's files + {saved['plain files'] / MIB:.1f} in the plain ones; "
        f"{total / kept:.3f} of the {kept / MIB:.1f} that must be kept (weights and two moments in fp32, and the weights as plain files)",
        f"seconds {save_s:.3f} a save, {write_s:.3f} for a plain write of as many bytes by the same ranks: {save_s / write_s:.2f}",
        f"share   a step takes {step_s:.3f} s{alone}, so a save is {save_s / step_s:.2f} steps; {_share(config, step_s, save_s)}",
    ]
    return "\n".join(lines)


def _share(config: RunConfig, step_s: float, save_s: float) -> str:
    said = []
    if config.checkpoint.every_minutes is not None:
        said.append(
            f"every {config.checkpoint.every_minutes:g} minutes that is {save_s / (save_s + 60 * config.checkpoint.every_minutes):.3%} of a run's time"
        )
    if config.checkpoint.every_steps is not None:
        said.append(
            f"every {config.checkpoint.every_steps} steps that is {save_s / (save_s + config.checkpoint.every_steps * step_s):.3%} of a run's time"
        )
    return ", ".join(said) or "the recipe saves only at its end"


def _time(action: Callable[[], None]) -> float:
    collectives.barrier()
    since = time.perf_counter()
    action()
    collectives.barrier()
    return time.perf_counter() - since


def _write(path: Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
    path.unlink()
