"""An evaluation that is ready to be trained: source, data, processes, batch sizes and classifier."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from dmae_ds.config.batch import split_batch
from dmae_ds.config.evaluation import FinetuneConfig, LinearConfig
from dmae_ds.config.load import flatten
from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import eval_batches, train_batches
from dmae_ds.data.order import ORDER_VERSION, num_steps
from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.rand_augment import RandAugment
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import MeasuredOn
from dmae_ds.evaluate.subsets import ALL, check_labels, open_labelled, open_subset
from dmae_ds.finetune.augment import Prepare
from dmae_ds.finetune.build import Classifier, build
from dmae_ds.finetune.contrast import open_contrast
from dmae_ds.finetune.early import check_micro_batch
from dmae_ds.finetune.source import FREE_KEYS, Source
from dmae_ds.models.numerics import choose_determinism, choose_tf32
from dmae_ds.models.patches import Normalize
from dmae_ds.train.learning_rate import check_rates


@dataclass(frozen=True)
class Evaluation:
    """Everything that training a classifier needs, on this process.

    ids: sample ids [n] of the labelled training images in use
    """

    source: Source
    train_set: ShardSet
    val_set: ShardSet
    ids: np.ndarray
    accelerator: Accelerator
    micro_batch: int
    accumulation: int
    prepare: Prepare
    classifier: Classifier

    @property
    def config(self) -> FinetuneConfig | LinearConfig:
        """The recipe, complete."""
        return self.source.config

    @property
    def out(self) -> Path:
        """The folder of the evaluation's files."""
        return Path(self.config.run.dir).expanduser()

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.steps_after(self.config.optim.epochs)

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which every image is seen once, not rounded."""
        return len(self.ids) / self.config.optim.global_batch

    def steps_after(self, epochs: float) -> int:
        """Finished steps after a number of epochs."""
        return num_steps(epochs, len(self.ids), self.config.optim.global_batch)

    def epoch_ends(self) -> set[int]:
        """Numbers of finished steps after which an epoch is over; the last step is always one."""
        whole = range(1, int(self.config.optim.epochs) + 1)
        return {min(self.num_steps, self.steps_after(epoch)) for epoch in whole} | {self.num_steps}

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

    def measured_on(self) -> MeasuredOn:
        """The student, data and device of the result."""
        return MeasuredOn(
            labels=self.config.labels,
            subset_seed=check_labels(self.config.labels, self.config.subset_seed),
            step=self.classifier.step,
            num_train=len(self.ids),
            num_val=self.val_set.num_samples,
            data=self.train_set.fingerprint,
            val=self.val_set.fingerprint,
            device=device_name(self.accelerator.device),
            world_size=self.accelerator.num_processes,
        )

    def train_batches(self, *, start_step: int) -> Iterator[Batch]:
        """This process's micro-batches, augmented as the recipe says."""
        config, data = self.config, self.config.data
        img_size = self.classifier.img_size
        rand_augment = None
        if isinstance(config, FinetuneConfig) and config.augment.rand_augment is not None:
            rand_augment = RandAugment(config.augment.rand_augment, img_size=img_size, mean=data.mean)
        spec = BatchSpec(
            img_size=img_size,
            num_patches=0,
            crop_scale=data.crop_scale,
            flip=data.flip,
            seed=config.run.seed,
            global_batch=config.optim.global_batch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            crop="tensorflow" if isinstance(config, LinearConfig) else "torchvision",
            augment=rand_augment,
            subset=None if config.labels == ALL else self.ids,
            block=data.block,
            pixels=PixelFormat.of(data),
        )
        return train_batches(
            self.train_set,
            spec,
            start_step=start_step,
            stop_step=self.num_steps,
            num_workers=data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            buffer_gib=data.buffer_gib,
            max_corrupt=data.max_corrupt,
            corrupt_log=self.out / "corrupt.jsonl",
        )

    def val_batches(self) -> Iterator[Batch]:
        """This process's validation images."""
        return eval_batches(
            self.val_set,
            img_size=self.classifier.img_size,
            crop_pct=self.config.data.crop_pct,
            batch_size=max(64, self.micro_batch),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=self.config.data.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            pixels=PixelFormat.of(self.config.data),
        )


def open_evaluation(source: Source) -> Evaluation:
    """Open the data, start accelerate and build the classifier; nothing is written.

    Collective. Raises UserError for settings that do not fit together.
    """
    config = source.config
    train_set, val_set = open_labelled(config.data)
    ids = open_subset(source.results, train_set, labels=config.labels, seed=config.subset_seed, write=False)
    choose_determinism(config.run.deterministic)
    contrast = open_contrast(config, train_set, ids)
    accelerator = start_accelerator(config.precision, broadcast_buffers=contrast is None)
    choose_tf32(config.tf32, accelerator.device)
    micro_batch, accumulation = split_batch(
        config.optim.global_batch, config.optim.micro_batch, accelerator.num_processes, exact=True
    )
    check_micro_batch(config, micro_batch)
    steps = num_steps(config.optim.epochs, len(ids), config.optim.global_batch)
    check_rates(config.optim, num_steps=steps, num_images=len(ids))
    num_classes, device = len(train_set.classes), accelerator.device
    prepare = Prepare(
        config.augment if isinstance(config, FinetuneConfig) else None,
        Normalize(config.data.mean, config.data.std).to(device),
        num_classes=num_classes,
        seed=config.run.seed,
    )
    classifier = build(source, prepare.criterion(), num_classes=num_classes, device=device, contrast=contrast)
    return Evaluation(
        source=source,
        train_set=train_set,
        val_set=val_set,
        ids=ids,
        accelerator=accelerator,
        micro_batch=micro_batch,
        accumulation=accumulation,
        prepare=prepare,
        classifier=classifier,
    )


def start_accelerator(precision: str, *, broadcast_buffers: bool = True) -> Accelerator:
    """Start accelerate with the recipe's precision; a launcher's other precision is a UserError.

    broadcast_buffers: give all ranks the first one's buffers before each forward pass; a memory of all
    images is kept equal by other means, and would be much to send
    """
    wanted = {"fp32": "no", "bf16": "bf16"}[precision]
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if given not in ("no", wanted):
        raise UserError(
            f"accelerate launch was given --mixed_precision {given}, "
            f"but the recipe has precision {precision}; set precision=bf16, or leave the option out"
        )
    handlers = [] if broadcast_buffers else [DistributedDataParallelKwargs(broadcast_buffers=False)]
    return Accelerator(mixed_precision=wanted, kwargs_handlers=handlers)
