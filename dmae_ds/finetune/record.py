"""What an evaluation writes down: the files of an epoch, the line of results.jsonl, what is said at the start."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from dmae_ds.config.evaluation import ClassifierConfig, FinetuneConfig, LinearConfig
from dmae_ds.finetune.build import Classifier
from dmae_ds.finetune.checkpoint import RESUME_FILE, save_resume
from dmae_ds.finetune.network import save_classifier
from dmae_ds.finetune.source import Source
from dmae_ds.output.durable import replacing
from dmae_ds.train.optim import peak_lr


@dataclass
class Progress:
    """How far an evaluation is: finished steps, seconds so far, and a row of figures for each finished epoch."""

    step: int = 0
    seconds: float = 0.0
    epochs: list[dict] = field(default_factory=list)


def save_epoch(
    out: Path,
    classifier: Classifier,
    config: ClassifierConfig,
    progress: Progress,
    *,
    identity: dict,
    is_best: bool,
) -> None:
    """The files of an epoch; what is continued from comes last, so that a run killed in between makes the same files again."""
    row = progress.epochs[-1]
    said = {
        "step": row["step"],
        "epoch": f"{row['epoch']:.6g}",
        "top1": f"{row['top1']:.4f}",
        "mean": config.data.mean,
        "std": config.data.std,
    }
    for name in ("best", "last") if is_best else ("last",):
        save_classifier(
            out / f"{name}.safetensors", classifier.tensors(), classifier.model, classifier.keys, **said
        )
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in progress.epochs))
    save_resume(
        out / RESUME_FILE,
        task=classifier.task,
        optimizer=classifier.optimizer,
        ema=classifier.ema,
        identity=identity,
        **vars(progress),
    )


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def metric_of(config: ClassifierConfig) -> str:
    """linear, finetune; supervised: from scratch, or beside a teacher."""
    if isinstance(config, LinearConfig):
        return "linear"
    return "supervised" if config.distill is not None or config.init == "random" else "finetune"


def settings_of(source: Source, classifier: Classifier) -> dict:
    """What defines the number, flat."""
    config = source.config
    settings = {
        "recipe": source.recipe,
        "epochs": config.optim.epochs,
        "pool": config.pool,
        "img_size": classifier.img_size,
        "global_batch": config.optim.global_batch,
        "base_lr": config.optim.base_lr,
        "seed": config.run.seed,
        "precision": config.precision,
    }
    if isinstance(config, FinetuneConfig):
        distill = None if config.distill is None else config.distill.method
        settings |= {
            "init": config.init,
            "layer_decay": config.optim.layer_decay,
            "drop_path": config.drop_path,
            "ema": config.ema,
            "distill": distill,
        }
    return settings


def summary(
    source: Source,
    classifier: Classifier,
    num_train: int,
    num_val: int,
    steps: int,
    start: int,
    cut: tuple[int, int, int],
) -> str:
    """What is about to happen, for a person to read before it costs anything."""
    config, (world_size, micro_batch, accumulation) = source.config, cut
    trained = sum(
        parameter.numel() for group in classifier.optimizer.param_groups for parameter in group["params"]
    )
    rows = {
        "weights": f"{source.file}" + (f"; {classifier.about}" if classifier.about else ""),
        "network": f"{classifier.model.name}, {trained / 1e6:.2f} M parameters trained, {classifier.img_size} px, {config.pool} pooled",
        "data": f"{num_train:,} images ({config.labels} labels), {num_val:,} to validate on",
        "batch": f"{config.optim.global_batch} = {world_size} ranks x {micro_batch} images x {accumulation} accumulated",
        "schedule": f"{steps:,} steps = {config.optim.epochs:g} epochs ({config.optim.warmup_epochs:g} warm-up), lr {peak_lr(config.optim):.3g}"
        + (f", from step {start}" if start else ""),
        "out": config.run.dir,
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items())
