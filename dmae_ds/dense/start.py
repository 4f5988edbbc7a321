"""Data, processes and batch of a dense training, before a network is built; shared by all dense tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from dmae_ds.config.batch import split_batch
from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.load import flatten
from dmae_ds.data.dense import DenseSample, DenseSet, open_dense
from dmae_ds.data.order import ORDER_VERSION
from dmae_ds.data.storage import Access
from dmae_ds.dense.batches import DenseBatches, Transform, whole_images
from dmae_ds.dense.schedule import total_steps
from dmae_ds.distributed.device import device_name
from dmae_ds.evaluate.results import METRICS, MeasuredOn, append_result, make_result
from dmae_ds.finetune.evaluation import start_accelerator
from dmae_ds.finetune.record import Progress
from dmae_ds.finetune.source import FREE_KEYS, Source
from dmae_ds.models.numerics import choose_determinism, choose_tf32


@dataclass(frozen=True)
class Start:
    """Opened shards, accelerate, and how a rank cuts its share of the batch."""

    source: Source
    train_set: DenseSet
    val_set: DenseSet
    accelerator: Accelerator
    micro_batch: int
    accumulation: int

    @property
    def config(self) -> DenseConfig:
        """The recipe, complete."""
        return self.source.config

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return total_steps(self.config.optim, len(self.train_set))

    def batches(self, transform: Transform) -> DenseBatches:
        """This rank's training batches."""
        return DenseBatches(
            dense_set=self.train_set,
            transform=transform,
            seed=self.config.run.seed,
            global_batch=self.config.optim.global_batch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def val_images(self) -> Iterator[DenseSample]:
        """This rank's part of data.val, whole."""
        return whole_images(
            self.val_set,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.data.num_workers,
        )

    def identity(self, command: str) -> dict:
        """Values that a continued run must have in common with the run that was killed."""
        recipe = flatten(self.config.model_dump(mode="json"))
        return {key: value for key, value in recipe.items() if key not in FREE_KEYS} | {
            "command": command,
            "micro_batch": self.micro_batch,
            "order": ORDER_VERSION,
            "data.train's fingerprint": self.train_set.fingerprint,
            "data.val's fingerprint": self.val_set.fingerprint,
            **self.source.contents(),
        }

    def describe(self, task: nn.Module, *, kind: str, pixels: str, num_classes: int, note: str | None) -> str:
        """Lines about weights, network, data and batch for a person, before anything is computed.

        kind: of the head; note: on the weights
        """
        optim = self.config.optim
        trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
        ranks = f"{self.accelerator.num_processes} ranks"
        batch = f"{ranks} x {self.micro_batch} images x {self.accumulation} accumulated"
        lines = [
            f"{'weights':<10}{self.source.file}" + (f"; {note}" if note else ""),
            f"{'network':<10}{self.config.network.name}, {kind}, {trained / 1e6:.2f} M parameters trained, "
            f"{pixels}, {num_classes} classes",
            f"{'data':<10}{len(self.train_set):,} images, {len(self.val_set):,} to validate on",
            f"{'batch':<10}{optim.global_batch} = {batch}, lr {optim.lr:g}, {optim.decay}",
            f"{'out':<10}{self.config.run.dir}",
        ]
        return "\n".join(lines)

    def add_result(self, progress: Progress, *, metric: str, settings: dict, step: int) -> dict:
        """Add the last scores to results.jsonl, on one process, and return the line.

        step: of the student
        """
        config, optim = self.config, self.config.optim
        result = make_result(
            MeasuredOn(
                labels="all",
                subset_seed=None,
                step=step,
                num_train=len(self.train_set),
                num_val=len(self.val_set),
                data=self.train_set.fingerprint,
                val=self.val_set.fingerprint,
                device=device_name(self.accelerator.device),
                world_size=self.accelerator.num_processes,
            ),
            metric=metric,
            scores={name: progress.epochs[-1][name] for name in METRICS[metric].scores},
            settings={
                "recipe": self.source.recipe,
                "steps": self.total,
                "global_batch": optim.global_batch,
                "lr": optim.lr,
                "layer_decay": optim.layer_decay,
                "drop_path": config.drop_path,
                "init": config.init,
                "seed": config.run.seed,
                "precision": config.precision,
                **settings,
                **self.source.teacher(),
                **self.source.changed,
            },
            seconds=progress.seconds,
        )
        if self.accelerator.is_main_process:
            append_result(self.source.results, result)
        return result


def open_start(source: Source, *, boxes: bool = False) -> Start:
    """Open the shards and start accelerate; nothing is written.

    boxes: samples have boxes and masks, otherwise label maps
    Collective. Raises UserError for shards that can't be used and a batch that can't be cut.
    """
    config = source.config
    access = Access.of(config.data)
    train_set = open_dense(config.data.train, label="data.train", access=access, maps=not boxes, boxes=boxes)
    val_set = open_dense(config.data.val, label="data.val", access=access, maps=not boxes, boxes=boxes)
    choose_determinism(config.run.deterministic)
    accelerator = start_accelerator(config.precision)
    choose_tf32(config.tf32, accelerator.device)
    optim = config.optim
    micro_batch, accumulation = split_batch(
        optim.global_batch, optim.micro_batch, accelerator.num_processes, exact=True
    )
    return Start(source, train_set, val_set, accelerator, micro_batch, accumulation)
