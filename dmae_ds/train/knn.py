"""k-NN during training (`eval.knn_every`): how good the student's features are so far, on all ranks together.

The number is the one that `dmae-ds eval knn` would give at that step. It goes with the step's losses into
metrics.jsonl and the trackers (knn/top1, knn/top5), and into RUN/results.jsonl. The student is copied out
of the engine, and random numbers are restored afterwards, so training continues as if it had not been
measured.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dmae_ds.config.data import DataConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.run import EvalConfig
from dmae_ds.distributed import collectives
from dmae_ds.distributed.device import device_name
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import FeatureOptions, build_timm, extract_features
from dmae_ds.evaluate.frozen import FrozenFeatures, settings_of
from dmae_ds.evaluate.knn import classify
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.subsets import ALL, check_labels, open_labelled, open_subset, warn_of_same_images
from dmae_ds.train.engine import Engine
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.schedule import Schedule

AUTOCAST = {"bf16": torch.bfloat16, "bf16_autocast": torch.bfloat16, "fp16": torch.float16}


class TrainingRanks:
    """Ranks of a training run, as evaluation sees processes (`evaluate.features.Processes`)."""

    def __init__(self, world: World, device: torch.device, *, precision: str):
        self.num_processes, self.process_index = world.size, world.rank
        self.is_main_process, self.device = world.is_main, device
        self._dtype = AUTOCAST.get(precision)
        self.mixed_precision = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "no"}[self._dtype]

    def autocast(self) -> AbstractContextManager:
        """Context in which networks compute in the recipe's precision."""
        return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks, in the order of ranks. Collective."""
        return collectives.gather_rows(tensor)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks. Collective."""
        return collectives.sum_over_ranks(tensor)


class KnnDuringTraining:
    """Measures k-NN where it is due; call it with the number of finished steps after each step.

    Collective. Raises UserError, on every rank, for an image that cannot be read and features that are not
    finite.
    """

    def __init__(
        self,
        config: EvalConfig,
        data: DataConfig,
        student: ModelConfig,
        *,
        run_dir: Path,
        schedule: Schedule,
        engine: Engine,
        metric_logger: MetricLogger,
        ranks: TrainingRanks,
    ):
        self.config, self.data, self.student = config, data, student
        self.run_dir, self.schedule = run_dir, schedule
        self.engine, self.metric_logger, self.ranks = engine, metric_logger, ranks
        self.sets = open_labelled(data)
        warn_of_same_images(*self.sets)
        self.seed = check_labels(config.knn_labels, None)
        self.ids = open_subset(
            run_dir, self.sets[0], labels=config.knn_labels, seed=self.seed, write=ranks.is_main_process
        )

    def __call__(self, step: int) -> None:
        if not self.schedule.is_due(step, every=self.config.knn_every):
            return
        start, device = time.monotonic(), self.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            frozen = self._embed(step)
        try:
            accuracies = classify(
                frozen,
                ks=[self.config.knn_k],
                temperature=self.config.knn_temperature,
                memory_gib=self.config.memory_gib,
                processes=self.ranks,
            )
        except UserError as error:
            error.on_every_rank = True
            raise
        ((k, (top1, top5)),) = accuracies.items()
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
        numbers = {"knn/top1": top1} if top5 is None else {"knn/top1": top1, "knn/top5": top5}
        self.metric_logger.note(numbers, seconds=time.monotonic() - start)

    def _embed(self, step: int) -> FrozenFeatures:
        """Compute the features of the labelled training images and of data.val."""
        student = copy_student(self.engine, self.student).to(self.ranks.device)
        options = FeatureOptions.of(self.data, pool=self.config.knn_pool, batch_size=self.config.batch_size)
        train_subset = None if self.config.knn_labels == ALL else self.ids
        tensors = []
        for shard_set, subset in zip(self.sets, (train_subset, None), strict=True):
            tensors += extract_features(
                student,
                shard_set,
                options,
                processes=self.ranks,
                title=None,
                subset=subset,
                agree=collectives.raise_on_all_ranks,
            )
        measured_on = MeasuredOn(
            labels=self.config.knn_labels,
            subset_seed=self.seed,
            step=step,
            num_train=len(self.ids),
            num_val=self.sets[1].num_samples,
            data=self.sets[0].fingerprint,
            val=self.sets[1].fingerprint,
            device=device_name(self.ranks.device),
            world_size=self.ranks.num_processes,
        )
        return FrozenFeatures(*tensors, len(self.sets[0].classes), measured_on)


def copy_student(engine: Engine, config: ModelConfig) -> VisionTransformer:
    """Copy the student out of an engine into timm's own class, in eval mode. Collective."""
    student = build_timm(config)
    prefix = "student."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in engine.full_weights(on_every_rank=True).items()
        if name.startswith(prefix)
    }
    student.load_state_dict(weights, strict=True)
    return student.eval()
