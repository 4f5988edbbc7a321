"""The classifier that a run has trained, where its objective trains one: written as timm names it, and measured on data.val.

    RUN/classifier.safetensors   timm's network: its create_model arguments are in the metadata, as `dmae-ds eval finetune` has them
    RUN/accuracy.json            top-1 and top-5 in percent; also in the last line of metrics.jsonl and in results.jsonl

What is measured is what was written: timm's own network with the whole fp32 weights in it, in evaluation mode.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn

from dmae_ds.config.run import RunConfig
from dmae_ds.data.loader import eval_batches
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.distributed.device import device_name
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.subsets import ALL
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import normalized
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.output.durable import replace_tensors, write_atomically
from dmae_ds.train.engine import Engine
from dmae_ds.train.knn import TrainingRanks
from dmae_ds.train.metrics import MetricLogger

CLASSIFIER_FILE, ACCURACY_FILE = "classifier.safetensors", "accuracy.json"
BATCH_SIZE = 64  # pictures a rank looks at together


class FinalAccuracy:
    """Call it with the number of finished steps, after each: at the last one the classifier is written and measured. Collective.

    train: the shards it was trained on. Without data.val it is written and not measured.
    """

    def __init__(
        self,
        classifier: Classifier,
        config: RunConfig,
        train: ShardSet,
        *,
        run_dir: Path,
        engine: Engine,
        metric_logger: MetricLogger,
        ranks: TrainingRanks,
        num_steps: int,
    ):
        self.classifier, self.config, self.train, self.run_dir = classifier, config, train, run_dir
        self.engine, self.metric_logger, self.ranks, self.num_steps = engine, metric_logger, ranks, num_steps

    def __call__(self, step: int) -> None:
        if step != self.num_steps:
            return
        start, device, data = time.monotonic(), self.ranks.device, self.config.data
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            network = self.classifier.build()
        tensors = self.classifier.tensors(self.engine.full_weights(on_every_rank=True))
        network.load_state_dict(tensors, strict=True)
        if self.ranks.is_main_process:
            path = self.run_dir / CLASSIFIER_FILE
            replace_tensors(path, tensors, self._metadata(step))
        if data.val is None:
            return
        val = ShardSet.open(data.val, label="data.val", access=Access.of(data))
        top1, top5 = measure(
            network.eval().to(device),
            val,
            self.config,
            ranks=self.ranks,
            img_size=self.classifier.numbers["img_size"],
        )
        seconds = time.monotonic() - start
        found = {"accuracy/top1": top1} if top5 is None else {"accuracy/top1": top1, "accuracy/top5": top5}
        if self.ranks.is_main_process:
            said = {
                "top1": top1,
                "top5": top5,
                "step": step,
                "num_val": val.num_samples,
                "data": self.train.fingerprint,
            }
            write_atomically(
                self.run_dir / ACCURACY_FILE, json.dumps({**said, "val": val.fingerprint}).encode() + b"\n"
            )
            begun = self.config.student.weights is not None
            settings = {
                "recipe": self.config.objective.name,
                "init": "weights" if begun else "random",
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
                device=device_name(device),
                world_size=self.ranks.num_processes,
            )
            result = make_result(
                measured_on,
                metric="finetune" if begun else "supervised",
                scores={"top1": top1, "top5": top5},
                settings=settings,
                seconds=seconds,
            )
            append_result(self.run_dir, result)
        self.metric_logger.note(found, seconds=seconds)

    def _metadata(self, step: int) -> dict[str, str]:
        about = {
            "keys": self.classifier.keys,
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
        }
        return {
            "format": "pt",
            "timm_name": self.classifier.name,
            "timm_overrides": json.dumps(self.classifier.numbers),
            "classifier": json.dumps(about),
            "step": str(step),
        }


@torch.no_grad()
def measure(
    network: nn.Module, val: ShardSet, config: RunConfig, *, ranks: TrainingRanks, img_size: int
) -> tuple[float, float | None]:
    """Top-1 and top-5 in percent over all ranks' pictures, each seen once; top-5 is None with five classes or fewer. Collective."""
    data, num_classes = config.data, len(val.classes)
    normalize = Normalize(data.mean, data.std).to(ranks.device)
    batches = eval_batches(
        val,
        img_size=img_size,
        crop_pct=data.crop_pct,
        batch_size=BATCH_SIZE,
        rank=ranks.process_index,
        world_size=ranks.num_processes,
        num_workers=data.num_workers,
    )
    counts = torch.zeros(
        3, dtype=torch.float64, device=ranks.device
    )  # right at once, right among five, pictures
    for batch in batches:
        batch = batch.to(ranks.device)
        with ranks.autocast():
            logits = network(normalized(batch.images, normalize))
        hits = logits.float().topk(min(5, num_classes), dim=1).indices == batch.labels[:, None]  # [N, 5]
        counts += torch.stack(
            [hits[:, 0].sum(), hits.any(dim=1).sum(), torch.tensor(len(hits), device=hits.device)]
        )
    right, among_five, pictures = ranks.reduce(counts).tolist()
    return 100 * right / pictures, (100 * among_five / pictures if num_classes > 5 else None)
