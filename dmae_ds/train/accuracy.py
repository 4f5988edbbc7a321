"""Final accuracy of a run that trains a classifier, stored with timm's names and measured on data.val.

    RUN/classifier.safetensors   timm's network; its create_model arguments are in the metadata, as those of
                                 `dmae-ds eval finetune` are
    RUN/accuracy.json            top-1 and top-5 in percent; also in metrics.jsonl (last line), results.jsonl

What is measured is what was written: timm's own network with the full fp32 weights in it, in evaluation mode.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.distributed.device import device_name
from dmae_ds.evaluate.accuracy import measure_accuracy
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.subsets import ALL
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.output.durable import replace_tensors, write_atomically
from dmae_ds.train.engine import Engine
from dmae_ds.train.knn import TrainingRanks
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.schedule import Schedule

CLASSIFIER_FILE, ACCURACY_FILE = "classifier.safetensors", "accuracy.json"
BATCH_SIZE = 64  # images of a rank


class FinalAccuracy:
    """Writes and measures the classifier after the last step; call it with every finished step.

    train: the shards it was trained on. Without data.val it is written and not measured. Collective.
    """

    def __init__(
        self,
        classifier: Classifier,
        config: RunConfig,
        train: ShardSet,
        *,
        run_dir: Path,
        schedule: Schedule,
        engine: Engine,
        metric_logger: MetricLogger,
        ranks: TrainingRanks,
    ):
        self.classifier, self.config, self.train = classifier, config, train
        self.run_dir, self.schedule = run_dir, schedule
        self.engine, self.metric_logger, self.ranks = engine, metric_logger, ranks

    def __call__(self, step: int) -> None:
        if step != self.schedule.num_steps:
            return
        start, device, data = time.monotonic(), self.ranks.device, self.config.data
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            network = self.classifier.build()
        tensors = self.classifier.tensors(self.engine.full_weights(on_every_rank=True))
        network.load_state_dict(tensors, strict=True)
        if self.ranks.is_main_process:
            replace_tensors(self.run_dir / CLASSIFIER_FILE, tensors, self._metadata(step))
        if data.val is None:
            return
        val = ShardSet.open(data.val, label="data.val", access=Access.of(data))
        top1, top5 = measure_accuracy(
            network.to(device),
            self._val_batches(val),
            normalize=Normalize(data.mean, data.std).to(device),
            num_classes=len(val.classes),
            processes=self.ranks,
        )
        seconds = time.monotonic() - start
        if self.ranks.is_main_process:
            self._write_results(val, top1=top1, top5=top5, step=step, seconds=seconds)
        numbers = {"accuracy/top1": top1} if top5 is None else {"accuracy/top1": top1, "accuracy/top5": top5}
        self.metric_logger.note(numbers, seconds=seconds)

    def _val_batches(self, val: ShardSet) -> Iterator[Batch]:
        """This rank's images of data.val."""
        return eval_batches(
            val,
            img_size=self.classifier.numbers["img_size"],
            crop_pct=self.config.data.crop_pct,
            batch_size=BATCH_SIZE,
            rank=self.ranks.process_index,
            world_size=self.ranks.num_processes,
            num_workers=self.config.data.num_workers,
            pin_memory=self.ranks.device.type == "cuda",
            pixels=PixelFormat.of(self.config.data),
        )

    def _write_results(
        self, val: ShardSet, *, top1: float, top5: float | None, step: int, seconds: float
    ) -> None:
        """Write RUN/accuracy.json and a line of RUN/results.jsonl."""
        accuracy = {
            "top1": top1,
            "top5": top5,
            "step": step,
            "num_val": val.num_samples,
            "data": self.train.fingerprint,
            "val": val.fingerprint,
        }
        write_atomically(self.run_dir / ACCURACY_FILE, json.dumps(accuracy).encode() + b"\n")
        has_weights = self.config.student.weights is not None
        settings = {
            "recipe": self.config.objective.name,
            "init": "weights" if has_weights else "random",
            "epochs": self.config.optim.epochs,
            "img_size": self.classifier.numbers["img_size"],
            "precision": self.ranks.mixed_precision,
        }
        measured_on = MeasuredOn(
            labels=ALL,
            subset_seed=None,
            step=step,
            num_train=self.train.num_samples,
            num_val=val.num_samples,
            data=self.train.fingerprint,
            val=val.fingerprint,
            device=device_name(self.ranks.device),
            world_size=self.ranks.num_processes,
        )
        result = make_result(
            measured_on,
            metric="finetune" if has_weights else "supervised",
            scores={"top1": top1, "top5": top5},
            settings=settings,
            seconds=seconds,
        )
        append_result(self.run_dir, result)

    def _metadata(self, step: int) -> dict[str, str]:
        """Strings that go into the file, from which `dmae-ds eval` and export build the network again."""
        classifier = {
            "keys": self.classifier.keys,
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
        }
        return {
            "format": "pt",
            "timm_name": self.classifier.name,
            "timm_overrides": json.dumps(self.classifier.numbers),
            "classifier": json.dumps(classifier),
            "step": str(step),
        }
