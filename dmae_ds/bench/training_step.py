"""Training's own optimiser step of a recipe, on random weights, timed by parts for `bench step`."""

from __future__ import annotations

import itertools
import time
from typing import Iterator

import torch

from dmae_ds.bench.random_batch import random_batch
from dmae_ds.bench.random_teacher import (
    check_one_teacher,
    check_replicated,
    random_teacher,
    random_teacher_view,
    random_top,
)
from dmae_ds.config.deepspeed import zero_stage
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.open import open_train
from dmae_ds.distributed.world import World
from dmae_ds.models.numerics import choose_determinism, choose_tf32
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.needs import Progress
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.fp8 import check_fp8, quantize_blocks
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher, needed_depths
from dmae_ds.train.cut import CutRecipe
from dmae_ds.train.ema import build_ema_teacher
from dmae_ds.train.engine import check_precision
from dmae_ds.train.family_engine import build_engine
from dmae_ds.train.inputs import batch_spec, copied, training_batches
from dmae_ds.train.kernels import choose_kernels
from dmae_ds.train.speed import wait_for

NUM_STEPS = 100_000  # length of the run that data is read for: more than is ever measured


class TrainingStep:
    """A step that is built once and taken with `take` as often as needed. Collective.

    data: read the recipe's data.train, as training does; otherwise random pixels are on the device
    Raises UserError for a recipe that can't be built.
    """

    def __init__(self, config: RunConfig, *, world: World, device: torch.device, data: bool):
        choose_determinism(config.run.deterministic)
        choose_tf32(config.tf32, device)
        check_precision(config.precision, device)
        self.device = device
        cut = CutRecipe.of(config, world)
        self.micro_batch, self.accumulation, self.deepspeed = *cut.split, cut.deepspeed
        check_one_teacher(config, "step")
        self.objective, shapes = build_objective(config)
        self.ema = build_ema_teacher(self.objective, precision=config.precision, device=device)
        self._progress = Progress(0, NUM_STEPS, 0.0, config.optim.epochs)
        self.objective.start_step(self._progress)
        self.teacher = NoTeacher()
        if config.teacher is not None:
            teacher = _random_teacher(config, self.objective, shapes[""].depth, device)
            self.teacher = self.objective.in_passes(teacher)
        self.kernels = choose_kernels(
            config,
            [self.objective, *self.teacher.networks(), self.ema.module],
            device,
            zero_stage=zero_stage(cut.deepspeed),
            is_large=True,
        ).text
        self.engine = build_engine(self.objective, config.optim, cut.deepspeed, device)
        self.engine.set_lr(0.0)
        self.normalize = Normalize(config.data.mean, config.data.std).to(device)
        self._reads_data = data
        self._batches = self._loaded(config, world) if data else self._random(world.rank)

    def take(self) -> dict[str, float]:
        """Take one step; returns {part: seconds}."""
        laps = _Laps(self.device)
        for _ in range(self.accumulation):
            batch = next(self._batches)
            if self._reads_data:
                laps("data")
            masked = self.objective.prepare(batch, self.normalize)
            laps("prepare")
            features = {}
            if self.objective.taps:
                features = self.teacher.features(masked)
                laps("teacher")
            if self.objective.ema is not None:
                features |= self.ema.features(masked)
                laps("ema")
            self.engine.train_micro_batch(masked, features, lap=laps)
        if self.objective.ema is not None and self.objective.ema.every == "step":
            self.ema.update(self.engine, self.objective.ema.momentum(self._progress))
            laps("update")
        return laps.seconds()

    def _random(self, rank: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 + rank)
        return itertools.cycle(
            [random_batch(self.objective, self.micro_batch, generator).to(self.device) for _ in range(4)]
        )

    def _loaded(self, config: RunConfig, world: World) -> Iterator[Batch]:
        shards = open_train(config.data, allow_pipe=False)
        spec = batch_spec(
            config,
            self.objective,
            world=world,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            num_samples=shards.num_samples,
        )
        batches = training_batches(
            config,
            shards,
            spec,
            stop_step=NUM_STEPS,
            pin_memory=self.device.type == "cuda",
        )
        return copied(batches, self.device)


def _random_teacher(
    config: RunConfig, objective: Objective, whole_blocks: int, device: torch.device
) -> FrozenTeacher:
    """Build the cut teacher with random weights, replicated."""
    check_replicated(config, "step")
    if config.teacher.dtype == "fp8":
        check_fp8(device)
    depth, _ = needed_depths(objective.taps, whole_blocks)
    vit = random_teacher(config, depth, None, device=device, sleep_ms=None)
    if config.teacher.dtype == "fp8":
        quantize_blocks(vit.blocks)
    return _RandomTeacher(
        vit,
        objective.taps,
        None,
        view=random_teacher_view(config, device),
        sees=seen_patches(config.teacher, vit.num_patches),
        top=random_top(config, objective, device=device),
    )


class _RandomTeacher(FrozenTeacher):
    """A teacher of random weights, described without a file."""

    def __str__(self) -> str:
        return f"{self.vit.depth} blocks"


class _Laps:
    """Time between marks, added up by name. On a GPU marks are events, so that only the end is waited for."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, object]] = []
        wait_for(device)
        self("start")

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((name, mark))

    def seconds(self) -> dict[str, float]:
        wait_for(self.device)
        seconds: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            spent = after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
            seconds[name] = seconds.get(name, 0.0) + spent
        return seconds
