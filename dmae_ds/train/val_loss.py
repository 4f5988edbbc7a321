"""Losses on data.val during training (`eval.loss_every`): a number for runs without labels.

They are the objective's own (pixel, align/...), under training's crops and masks, the same ones each time; a
gap to the training losses is what the student does not generalise. They go with the step's losses into
metrics.jsonl and the trackers, as val/loss, val/pixel ... Random numbers are restored afterwards, so training
continues as if nothing had been measured.
"""

from __future__ import annotations

import time
from typing import Iterable

import torch
from torch import Tensor

from dmae_ds.config.family import name_of_part
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.base import Objective
from dmae_ds.train.engine import Engine
from dmae_ds.train.inputs import batch_spec, copied, masked_batches, training_batches
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.networks import Teacher
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.schedule import Schedule


class LossDuringTraining:
    """Measures the losses where they are due; call it with the number of finished steps after each step.

    Whole global batches of data.val are taken, one at least. Collective.
    Raises UserError for an objective with an EMA teacher, whose state a measurement would change, and for a
    teacher that is not replicated.
    """

    def __init__(
        self,
        preflight: Preflight,
        objective: Objective,
        teacher: Teacher,
        *,
        engine: Engine,
        schedule: Schedule,
        metric_logger: MetricLogger,
        device: torch.device,
    ):
        config = preflight.config
        check_can_measure(config.named_teachers().values(), has_ema=objective.ema is not None)
        self.config, self.objective, self.teacher = config, objective, teacher
        self.engine, self.schedule, self.metric_logger = engine, schedule, metric_logger
        self.device = device
        self.val = ShardSet.open(config.data.val, label="data.val", access=Access.of(config.data))
        self.num_batches = max(1, self.val.num_samples // config.optim.global_batch)
        self.spec = batch_spec(
            config,
            objective,
            world=preflight.world,
            micro_batch=preflight.micro_batch,
            accumulation=preflight.accumulation,
        )

    def __call__(self, step: int) -> None:
        if not self.schedule.is_due(step, every=self.config.eval.loss_every):
            return
        start, device = time.monotonic(), self.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            losses = self._measure()
        self.metric_logger.note(
            {name_of_part("val", name, self.objective.members()): value for name, value in losses.items()},
            seconds=time.monotonic() - start,
        )

    def _measure(self) -> dict[str, float]:
        """The mean losses over all micro-batches of all ranks."""
        loaded = training_batches(
            self.config,
            self.val,
            self.spec,
            stop_step=self.num_batches,
            pin_memory=self.device.type == "cuda",
        )
        normalize = Normalize(self.config.data.mean, self.config.data.std).to(self.device)
        masked = masked_batches(copied(loaded, self.device), self.objective.prepare, normalize)
        sums: dict[str, Tensor] = {}
        count = 0
        for _, patches, features in self.teacher.stream(masked):
            for name, value in self.engine.evaluate_micro_batch(patches, features).items():
                sums[name] = sums.get(name, 0) + value.float()
            count += 1
        means = collectives.mean_over_ranks(torch.stack(list(sums.values())) / count)
        return dict(zip(sums, means.tolist(), strict=True))


def check_can_measure(teachers: Iterable[TeacherConfig], *, has_ema: bool) -> None:
    """Raise UserError, the same on every rank, where losses on data.val can't be measured during training."""
    problem = None
    if has_ema:
        problem = "requires an objective without an EMA teacher, whose state a measurement would change"
    for teacher in teachers:
        if teacher.placement != "replicated":
            problem = f"requires {teacher.key('placement')}=replicated, found {teacher.placement}"
    if problem is not None:
        error = UserError(f"eval.loss_every {problem}; remove eval.loss_every")
        error.on_every_rank = True
        raise error
