"""Records of an evaluation: the files of an epoch, the settings of its result, the summary at the start."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dmae_ds.config.evaluation import ClassifierConfig, FinetuneConfig, LinearConfig
from dmae_ds.finetune.build import Classifier
from dmae_ds.finetune.checkpoint import RESUME_FILE, save_resume
from dmae_ds.finetune.evaluation import Evaluation
from dmae_ds.finetune.network import save_classifier
from dmae_ds.finetune.source import Source
from dmae_ds.output.durable import replacing
from dmae_ds.output.lines import is_quiet
from dmae_ds.train.learning_rate import describe_repeats, peak_lr


@dataclass
class Progress:
    """The state of an evaluation: finished steps, seconds so far, a row of numbers per finished epoch."""

    step: int = 0
    seconds: float = 0.0
    epochs: list[dict] = field(default_factory=list)

    def add(self, row: dict, *, score: str = "top1") -> bool:
        """Add a finished epoch. Returns whether its score is above that of all epochs before."""
        is_best = score in row and all(row[score] > earlier.get(score, -1.0) for earlier in self.epochs)
        self.step, self.seconds, self.epochs = row["step"], row["seconds"], [*self.epochs, row]
        return is_best


def save_epoch(
    out: Path,
    classifier: Classifier,
    config: ClassifierConfig,
    progress: Progress,
    *,
    identity: dict,
    is_best: bool,
) -> None:
    """Write the files of an epoch.

    The state to continue from is written last, so a run that is killed in between makes the same files again.
    """
    row = progress.epochs[-1]
    metadata = {
        "step": row["step"],
        "epoch": f"{row['epoch']:.6g}",
        "top1": f"{row['top1']:.4f}",
        "mean": config.data.mean,
        "std": config.data.std,
    }
    for name in ("best", "last") if is_best else ("last",):
        save_classifier(
            out / f"{name}.safetensors", classifier.tensors(), classifier.model, classifier.kwargs, **metadata
        )
    write_metrics(out, progress)
    save_resume(
        out / RESUME_FILE,
        task=classifier.task,
        optimizer=classifier.optimizer,
        ema=classifier.ema,
        identity=identity,
        **vars(progress),
    )


def write_metrics(out: Path, progress: Progress) -> None:
    """Write metrics.jsonl: a line of numbers per finished epoch."""
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in progress.epochs))


def step_bar(num_steps: int, *, done: int, is_main: bool) -> tqdm:
    """A bar of steps for a terminal. In a log file the line of each epoch has to do."""
    hidden = not (is_main and sys.stderr.isatty()) or is_quiet()
    return tqdm(total=num_steps, initial=done, unit="step", disable=hidden, mininterval=0.5)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def metric_of(config: ClassifierConfig) -> str:
    """The metric's name: linear, finetune, or supervised (from scratch or with a teacher)."""
    if isinstance(config, LinearConfig):
        return "linear"
    return "supervised" if config.distill is not None or config.init == "random" else "finetune"


def settings_of(source: Source, classifier: Classifier) -> dict:
    """The settings that define the number, flat."""
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
            **source.teacher(),
        }
    return {**settings, **source.changed}


def summary(evaluation: Evaluation, *, start_step: int) -> str:
    """A description of the training that is about to start, for a person to read before it costs anything."""
    config, classifier = evaluation.config, evaluation.classifier
    groups = classifier.optimizer.param_groups
    num_trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    network = f"{classifier.model.name}, {num_trained / 1e6:.2f} M parameters trained"
    note = f"; {classifier.note}" if classifier.note else ""
    schedule = (
        f"{evaluation.num_steps:,} steps = {config.optim.epochs:g} epochs "
        f"({config.optim.warmup_epochs:g} warm-up), lr {peak_lr(config.optim):.3g}"
    )
    ranks = f"{evaluation.accelerator.num_processes} ranks"
    images = f"{evaluation.micro_batch} images x {evaluation.accumulation} accumulated"
    num_val = evaluation.val_set.num_samples
    rows = {
        "weights": f"{evaluation.source.file}{note}",
        "network": f"{network}, {classifier.img_size} px, {config.pool} pooled",
        "data": f"{len(evaluation.ids):,} images ({config.labels} labels), {num_val:,} to validate on",
        "batch": f"{config.optim.global_batch} = {ranks} x {images}",
        "schedule": schedule + (f", from step {start_step}" if start_step else ""),
        "out": config.run.dir,
        "WARNING": describe_repeats(config.optim.global_batch, len(evaluation.ids)),
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items() if text)
