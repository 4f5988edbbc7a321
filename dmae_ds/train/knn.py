"""k-NN during training (`eval.knn_every`): what the student's features are worth by now, measured on all ranks together.

The number is the one that `dmae-ds eval knn` would give at that step. It goes beside the step's losses into
metrics.jsonl and the trackers (knn/top1, knn/top5), and into RUN/results.jsonl. The student is copied out of the engine,
and random numbers are put back, so training goes on as if nothing had been.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.config.run import DataConfig, EvalConfig, ModelConfig
from dmae_ds.distributed import collectives
from dmae_ds.distributed.device import device_name
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.evaluate.features import FeatureOptions, build_timm, extract_features
from dmae_ds.evaluate.frozen import FrozenFeatures, settings_of
from dmae_ds.evaluate.knn import classify
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.subsets import ALL, check_labels, open_labelled, open_subset
from dmae_ds.train.engine import Engine
from dmae_ds.train.metrics import MetricLogger

AUTOCAST = {"bf16": torch.bfloat16, "bf16_autocast": torch.bfloat16, "fp16": torch.float16}


class TrainingRanks:
    """The ranks of a training run, as evaluation sees processes (`evaluate.features.Processes`)."""

    def __init__(self, world: World, device: torch.device, *, precision: str):
        self.num_processes, self.process_index, self.is_main_process, self.device = (
            world.size,
            world.rank,
            world.is_main,
            device,
        )
        self._dtype = AUTOCAST.get(precision)
        self.mixed_precision = (
            "no" if self._dtype is None else {torch.bfloat16: "bf16", torch.float16: "fp16"}[self._dtype]
        )

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        return collectives.gather_rows(tensor)

    def reduce(self, tensor: Tensor) -> Tensor:
        return collectives.sum_over_ranks(tensor)


class KnnDuringTraining:
    """Call it with the number of finished steps, after each: where k-NN is due, it is measured. Collective.

    steps_per_epoch: a float, as schedules count; num_steps: of the whole run
    """

    def __init__(
        self,
        config: EvalConfig,
        data: DataConfig,
        student: ModelConfig,
        *,
        run_dir: Path,
        engine: Engine,
        metric_logger: MetricLogger,
        ranks: TrainingRanks,
        steps_per_epoch: float,
        num_steps: int,
    ):
        self.config, self.data, self.student, self.run_dir = config, data, student, run_dir
        self.engine, self.metric_logger, self.ranks = engine, metric_logger, ranks
        self.steps_per_epoch, self.num_steps = steps_per_epoch, num_steps
        self.sets = open_labelled(data)
        self.seed = check_labels(config.knn_labels, None)
        self.ids = open_subset(
            run_dir, self.sets[0], labels=config.knn_labels, seed=self.seed, write=ranks.is_main_process
        )

    def __call__(self, step: int) -> None:
        if not is_due(
            step, every=self.config.knn_every, steps_per_epoch=self.steps_per_epoch, num_steps=self.num_steps
        ):
            return
        start, device = time.monotonic(), self.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            frozen = self._embed(step)
        try:
            options = {
                "temperature": self.config.knn_temperature,
                "memory_gib": self.config.memory_gib,
                "processes": self.ranks,
            }
            ((k, (top1, top5)),) = classify(frozen, ks=[self.config.knn_k], **options).items()
        except UserError as error:
            self.metric_logger.flush()  # a loss that isn't finite says more
            failure = RunFailed(f"k-NN at step {step}: {error}")
            failure.on_every_rank = True
            raise failure from None
        if self.ranks.is_main_process:
            settings = {
                "k": k,
                "temperature": self.config.knn_temperature,
                **settings_of(self.ranks, pool=self.config.knn_pool),
            }
            result = make_result(
                frozen.measured_on,
                metric="knn",
                scores={"top1": top1, "top5": top5},
                settings=settings,
                seconds=round(time.monotonic() - start, 3),
            )
            append_result(self.run_dir, result)
        found = {"knn/top1": top1} if top5 is None else {"knn/top1": top1, "knn/top5": top5}
        self.metric_logger.note(found, seconds=time.monotonic() - start)

    def _embed(self, step: int) -> FrozenFeatures:
        student = build_timm(self.student)
        prefix = "student."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.engine.full_weights(on_every_rank=True).items()
            if name.startswith(prefix)
        }
        student.load_state_dict(weights, strict=True)
        student.eval().to(self.ranks.device)
        options = FeatureOptions.of(self.data, pool=self.config.knn_pool, batch_size=self.config.batch_size)
        found = []
        for shard_set, subset in zip(
            self.sets, (None if self.config.knn_labels == ALL else self.ids, None), strict=True
        ):
            found += extract_features(
                student,
                shard_set,
                options,
                processes=self.ranks,
                title=None,
                subset=subset,
            )
        measured_on = MeasuredOn(
            labels=self.config.knn_labels,
            subset_seed=self.seed,
            step=step,
            num_train=len(self.ids),
            num_val=self.sets[1].num_samples,
            data=self.sets[0].fingerprint,
            device=device_name(self.ranks.device),
            world_size=self.ranks.num_processes,
        )
        return FrozenFeatures(*found, len(self.sets[0].classes), measured_on)


def is_due(step: int, *, every: float, steps_per_epoch: float, num_steps: int) -> bool:
    """Whether `step` is the first at or behind a multiple of `every` epochs, or the last of the run."""

    def passed(steps: int) -> int:
        return math.floor(steps / (every * steps_per_epoch) + 1e-9)  # 3 * (1 / 3) epochs are one

    return step == num_steps or passed(step) > passed(step - 1)
