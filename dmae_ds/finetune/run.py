"""One classifier, wired: weights, recipe, data -> network, task, optimiser -> the loop -> files and a line of results.

dmae-ds eval finetune RUN                                              # alone
torchrun --nproc_per_node 8 -m dmae_ds eval finetune RUN precision=bf16    # or accelerate launch --multi_gpu -m ...

OUT = RUN/<recipe>[-<labels>-seed<S>], or run.dir
OUT/config.yaml          the recipe, complete
OUT/metrics.jsonl        a line an epoch
OUT/best.safetensors     the classifier of the best epoch in timm's names (network.py); last.safetensors: of the last one
OUT/resume.pt            what a killed run continues from
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from dmae_ds.config.batch import split_batch
from dmae_ds.config.evaluation import FinetuneConfig, LinearConfig
from dmae_ds.config.load import dump_config, flatten
from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import eval_batches, train_batches
from dmae_ds.data.order import ORDER_VERSION, num_steps
from dmae_ds.data.rand_augment import RandAugment
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import MeasuredOn, append_result, make_result
from dmae_ds.evaluate.subsets import check_labels, open_labelled, open_subset
from dmae_ds.finetune.augment import Prepare
from dmae_ds.finetune.build import Classifier, build
from dmae_ds.finetune.checkpoint import RESUME_FILE, read_resume, restore
from dmae_ds.finetune.loop import train, validate
from dmae_ds.finetune.record import Progress, metric_of, save_epoch, settings_of, summary, write_text
from dmae_ds.finetune.source import find_source
from dmae_ds.models.patches import Normalize
from dmae_ds.train.optim import learning_rate

SCHEMAS = {"finetune": FinetuneConfig, "linear": LinearConfig}
# What may change between a run and its continuation: where things lie, and how fast they come.
_FREE = {
    "run.dir",
    "weights",
    "format",
    "optim.micro_batch",
    "distill.teacher",
    "data.train",
    "data.val",
    "data.num_workers",
    "data.buffer_gib",
    "data.retries",
    "data.timeout_s",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_corrupt",
    "data.shuffle_buffer",
}


def evaluate(
    command: str,
    word: str,
    *,
    recipe: str,
    overrides: list[str],
    labels: str = "all",
    subset_seed: int | None = None,
    resume: str = "never",
) -> dict:
    """Train a classifier by `finetune` or `linear` and write down what it is worth. Collective under a launcher.

    word: a run folder or a weights file; resume: `auto` continues a killed run, `never` refuses a folder that holds one
    Returns the line of results.jsonl, with the last epoch's scores. Raises UserError, and RunFailed for a loss that isn't finite.
    """
    source = find_source(
        word,
        schema=SCHEMAS[command],
        recipe=recipe,
        overrides=overrides,
        labels=labels,
        subset_seed=subset_seed,
    )
    config, out = source.config, Path(source.config.run.dir).expanduser()
    train_set, val_set = open_labelled(config.data)
    ids = open_subset(source.results, train_set, labels=config.labels, seed=config.subset_seed, write=False)
    accelerator = _accelerator(config.precision)
    main, device = accelerator.is_main_process, accelerator.device
    cut = split_batch(
        config.optim.global_batch, config.optim.micro_batch, accelerator.num_processes, exact=True
    )
    _check_micro_batch(config, cut[0])
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    augment = config.augment if isinstance(config, FinetuneConfig) else None
    prepare = Prepare(
        augment, normalize, num_classes=len(train_set.classes), seed=config.run.seed, device=device
    )
    classifier = build(source, prepare.criterion(), num_classes=len(train_set.classes), device=device)
    identity = {
        key: value for key, value in flatten(config.model_dump(mode="json")).items() if key not in _FREE
    } | {
        "command": command,
        "micro_batch": cut[0],
        "order": ORDER_VERSION,
        "data.train's fingerprint": train_set.fingerprint,
        "data.val's fingerprint": val_set.fingerprint,
    }
    found = read_resume(out / RESUME_FILE, identity) if resume == "auto" else None
    if resume == "never" and (out / "config.yaml").exists():
        raise UserError(
            f"'{out}' holds such an evaluation already; continue it with --resume auto, or choose another run.dir"
        )
    progress = (
        Progress(**{field.name: found[field.name] for field in fields(Progress)}) if found else Progress()
    )
    if found is not None:
        restore(found, task=classifier.task, optimizer=classifier.optimizer, ema=classifier.ema)
    steps = num_steps(config.optim.epochs, len(ids), config.optim.global_batch)
    batches = _batches(
        config, train_set, ids, classifier, accelerator, cut=cut, start_step=progress.step, stop_step=steps
    )
    accelerator.wait_for_everyone()  # every process has looked
    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", dump_config(config))
        open_subset(source.results, train_set, labels=config.labels, seed=config.subset_seed, write=True)
        print(
            summary(
                source,
                classifier,
                len(ids),
                val_set.num_samples,
                steps,
                progress.step,
                (accelerator.num_processes, *cut),
            ),
            file=sys.stderr,
            flush=True,
        )
    steps_per_epoch = len(ids) / config.optim.global_batch
    bar = tqdm(
        total=steps,
        initial=progress.step,
        unit="step",
        disable=not main,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )
    since = time.monotonic()

    def lr_at(step: int) -> float:
        return learning_rate(config.optim, step / steps_per_epoch)

    def after_step() -> None:
        if classifier.ema is not None:
            classifier.ema.update(classifier.network)
        bar.update()

    def after_epoch(step: int, losses: dict[str, float]) -> None:
        nonlocal since
        pictures = eval_batches(
            val_set,
            img_size=classifier.img_size,
            crop_pct=config.data.crop_pct,
            batch_size=max(64, cut[0]),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=config.data.num_workers,
        )
        top1, top5 = validate(
            classifier.judged,
            pictures,
            normalize=normalize,
            num_classes=len(train_set.classes),
            accelerator=accelerator,
        )
        now = time.monotonic()
        progress.seconds, since = progress.seconds + now - since, now
        row = {
            "epoch": step / steps_per_epoch,
            "step": step,
            "lr": lr_at(step - 1),
            **losses,
            "top1": top1,
            "top5": top5,
            "seconds": progress.seconds,
        }
        is_best = all(top1 > earlier["top1"] for earlier in progress.epochs)
        progress.step, progress.epochs = step, [*progress.epochs, row]
        if main:
            save_epoch(out, classifier, config, progress, identity=identity, is_best=is_best)
            tqdm.write(
                f"epoch {row['epoch']:.4g}: loss {row['loss']:.4f}, top-1 {top1:.2f}%"
                + (f", top-5 {top5:.2f}%" if top5 is not None else ""),
                file=sys.stderr,
            )
        accelerator.wait_for_everyone()

    ends = {
        min(steps, num_steps(epoch, len(ids), config.optim.global_batch))
        for epoch in range(1, int(config.optim.epochs) + 1)
    } | {steps}
    with bar:
        train(
            classifier.task,
            classifier.optimizer,
            batches,
            prepare=prepare,
            accelerator=accelerator,
            lr_at=lr_at,
            start_step=progress.step,
            num_steps=steps,
            accumulation=cut[1],
            clip_grad=config.optim.clip_grad if isinstance(config, FinetuneConfig) else 0.0,
            epoch_ends=ends,
            after_step=after_step,
            after_epoch=after_epoch,
        )
    last, best = progress.epochs[-1], max(row["top1"] for row in progress.epochs)
    measured_on = MeasuredOn(
        labels=config.labels,
        subset_seed=check_labels(config.labels, config.subset_seed),
        step=classifier.step,
        num_train=len(ids),
        num_val=val_set.num_samples,
        data=train_set.fingerprint,
        device=device_name(device),
        world_size=accelerator.num_processes,
    )
    result = make_result(
        measured_on,
        metric=metric_of(config),
        scores={"top1": last["top1"], "top5": last["top5"]},
        settings=settings_of(source, classifier),
        seconds=progress.seconds,
    )
    if main:
        append_result(source.results, result)
        print(
            f"{result['metric']} top-1 {last['top1']:.1f}% ({source.recipe}, last of {config.optim.epochs:g} epochs; best {best:.1f}%), {len(ids)} train, {val_set.num_samples} val: {out}",
            flush=True,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def _batches(
    config: FinetuneConfig | LinearConfig,
    train_set: ShardSet,
    ids: np.ndarray,
    classifier: Classifier,
    accelerator: Accelerator,
    *,
    cut: tuple[int, int],
    start_step: int,
    stop_step: int,
) -> Iterator[Batch]:
    """This process's micro-batches, augmented as the recipe says. cut: (micro-batch, accumulation)."""
    data, rand_augment = config.data, None
    if isinstance(config, FinetuneConfig) and config.augment.rand_augment is not None:
        rand_augment = RandAugment(config.augment.rand_augment, img_size=classifier.img_size, mean=data.mean)
    spec = BatchSpec(
        img_size=classifier.img_size,
        num_patches=0,
        crop_scale=data.crop_scale,
        flip=data.flip,
        seed=config.run.seed,
        global_batch=config.optim.global_batch,
        micro_batch=cut[0],
        accumulation=cut[1],
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        crop="tensorflow" if isinstance(config, LinearConfig) else "torchvision",
        augment=rand_augment,
        subset=None if config.labels == "all" else ids,
        block=data.block,
    )
    return train_batches(
        train_set,
        spec,
        start_step=start_step,
        stop_step=stop_step,
        num_workers=data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        buffer_gib=data.buffer_gib,
        max_corrupt=data.max_corrupt,
        corrupt_log=Path(config.run.dir).expanduser() / "corrupt.jsonl",
    )


def _check_micro_batch(config: FinetuneConfig | LinearConfig, micro_batch: int) -> None:
    if isinstance(config, FinetuneConfig) and config.augment.mixes and micro_batch % 2:
        raise UserError(
            f"mixing pairs pictures of a micro-batch, and {micro_batch} is odd; set optim.micro_batch to an even number, or augment.mixup=0 augment.cutmix=0"
        )
    if isinstance(config, LinearConfig) and micro_batch < 2:
        raise UserError(
            "the probe's batch norm needs at least two pictures in a micro-batch; raise optim.micro_batch, or take fewer ranks"
        )


def _accelerator(precision: str) -> Accelerator:
    """accelerate with the recipe's precision. Raises UserError where its launcher was told another."""
    wanted, told = (
        {"fp32": "no", "bf16": "bf16"}[precision],
        os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    )
    if told not in ("no", wanted):
        raise UserError(
            f"accelerate launch was told --mixed_precision {told}, the recipe says precision {precision}; set precision=bf16, or leave the option out"
        )
    return Accelerator(mixed_precision=wanted)
