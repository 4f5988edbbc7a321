"""Dense k-NN during training (`eval.dense_every`): how good the student's patch features are so far.

The number is the one that `dmae-ds eval dense` would give at that step. It goes with the step's losses into
metrics.jsonl and the trackers (dense/miou), and into RUN/results.jsonl. As with k-NN (knn.py), the student is
copied out of the engine, and random numbers are restored afterwards.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dmae_ds.config.data import DataConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.run import EvalConfig
from dmae_ds.data.dense import DenseSet
from dmae_ds.errors import UserError
from dmae_ds.evaluate.dense import KnnOptions, make_dense_result, measure
from dmae_ds.evaluate.dense_features import DenseNetwork, DenseOptions
from dmae_ds.evaluate.dense_sets import open_dense_sets
from dmae_ds.evaluate.results import append_result
from dmae_ds.evaluate.subsets import warn_of_same_images
from dmae_ds.train.engine import Engine
from dmae_ds.train.knn import TrainingRanks, copy_student
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.schedule import Schedule

BATCH_SIZE = 8  # as of `dmae-ds eval dense`


class DenseDuringTraining:
    """Measures dense k-NN where it is due; call it with the number of finished steps after each step.

    Collective.
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
        shard_sets = open_dense_sets(config, data)
        warn_of_same_images(*shard_sets)
        self.sets = tuple(DenseSet(shard_set, boxes=False) for shard_set in shard_sets)
        self.task = KnnOptions(k=config.dense_k, patches=config.dense_patches, memory_gib=config.memory_gib)

    def __call__(self, step: int) -> None:
        if not self.schedule.is_due(step, every=self.config.dense_every):
            return
        start, device = time.monotonic(), self.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            network = DenseNetwork(copy_student(self.engine, self.student)).to(device)
            options = DenseOptions.of(
                self.data,
                patch_size=network.patch_size,
                batch_size=BATCH_SIZE,
                size=self.config.dense_size,
            )
            try:
                scores = measure(
                    network, *self.sets, options, self.task, processes=self.ranks, is_shown=False
                )
            except UserError as error:
                error.on_every_rank = not error.of_one_rank
                raise
        seconds = time.monotonic() - start
        if self.ranks.is_main_process:
            result = make_dense_result(
                scores,
                self.task,
                options,
                sets=self.sets,
                step=step,
                seconds=seconds,
                processes=self.ranks,
            )
            append_result(self.run_dir, result)
        self.metric_logger.note({"dense/miou": scores["miou"]}, seconds=seconds)
