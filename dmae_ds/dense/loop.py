"""The training of any dense task, made of fine-tuning's parts (dmae_ds/finetune): loop, files, resuming.

    training = Training(source=..., task=task, optimizer=..., batches=..., ...)
    progress = train_dense(training, resume="auto")

A task is a DenseTask: its network with the heads, a loss of a micro-batch, and scores of data.val.

OUT/config.yaml          the recipe, complete
OUT/metrics.jsonl        one line whenever the state is saved, with scores where they were measured
OUT/best.safetensors     the network with the best score; OUT/last.safetensors: the one scored last
OUT/resume.pt            the state that a killed run continues from
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.load import dump_config
from dmae_ds.data.dense import DenseSample
from dmae_ds.data.transforms import sample_rng
from dmae_ds.dense.batches import DenseBatches, to_device
from dmae_ds.dense.schedule import learning_rate, points, total_steps
from dmae_ds.evaluate.results import METRICS
from dmae_ds.finetune.augment import DROP_PATH_STREAM
from dmae_ds.finetune.checkpoint import RESUME_FILE, read_resume, restore, save_resume
from dmae_ds.finetune.claim import claim
from dmae_ds.finetune.early import check_is_new
from dmae_ds.finetune.loop import LoopSettings, raise_unless_finite, train
from dmae_ds.finetune.record import Progress, step_bar, write_metrics, write_text
from dmae_ds.objectives.augment import seed_globals
from dmae_ds.output.lines import say


class DenseTask(nn.Module):
    """A network with its heads, and what is trained and measured of it; the loop knows nothing else.

    Random draws of `loss` come from torch's global generator, which is seeded for each micro-batch. A frozen
    network of a distillation is the submodule `teacher`: it stays in eval mode, and in its own file.
    """

    def loss(self, batch: list[DenseSample]) -> dict[str, Tensor]:
        """{"loss": scalar, named parts: scalars} of samples on the task's device; always the same names."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """{score: value} of data.val, the same on every rank. Collective; it may leave eval mode on."""
        raise NotImplementedError

    def forward(self, batch: list[DenseSample]) -> dict[str, Tensor]:
        """The loss: what DistributedDataParallel wraps."""
        return self.loss(batch)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A dense task that is ready to be trained, on this process.

    task: on its device; metric: a key of METRICS, whose headline chooses the best
    identity: values that a continued run must have in common with the run that was killed
    save: (path, metadata) writes the network in evaluation's form; summary: for a person, before it starts
    """

    config: DenseConfig
    task: DenseTask
    optimizer: torch.optim.Optimizer
    batches: DenseBatches
    accelerator: Accelerator
    metric: str
    identity: dict
    save: Callable[[Path, dict[str, object]], None]
    summary: str

    @property
    def out(self) -> Path:
        """The folder of the training's files."""
        return Path(self.config.run.dir).expanduser()

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return total_steps(self.config.optim, len(self.batches.dense_set))


def train_dense(training: Training, *, resume: str) -> Progress:
    """Train to the last step, or what is left of it, and write the files. Collective.

    resume: `auto` continues a killed training, or starts one; `never` refuses a folder that holds one
    Raises UserError, and RunFailed for a loss that is not finite.
    """
    lock = claim(training.out, training.accelerator)
    progress = _start_or_resume(training, resume)
    training.accelerator.wait_for_everyone()  # every process has looked at the folder before it is written to
    if training.accelerator.is_main_process:
        write_text(training.out / "config.yaml", dump_config(training.config))
        at = f", from step {progress.step}" if progress.step else ""
        say(f"{training.summary}\n{'steps':<10}{training.total:,}{at}", dated=False)
    _train(training, progress)
    training.accelerator.wait_for_everyone()
    if lock is not None:
        lock.close()
    return progress


def _start_or_resume(training: Training, resume: str) -> Progress:
    """Put a killed training's state back, or start with none."""
    if resume == "never":
        check_is_new(training.out)
    saved = read_resume(training.out / RESUME_FILE, training.identity) if resume == "auto" else None
    if saved is None:
        return Progress()
    restore(saved, task=training.task, optimizer=training.optimizer, ema=None)
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def _train(training: Training, progress: Progress) -> None:
    """Train; save and score at their points."""
    optim, task, accelerator = training.config.optim, training.task, training.accelerator
    num_images, total = len(training.batches.dense_set), training.total
    scored = points(optim.evaluate_every, optim, num_images)
    batches = training.batches.steps(progress.step, total)
    bar = step_bar(total, done=progress.step, is_main=accelerator.is_main_process)
    since = time.monotonic()

    def lr_at(step: int) -> float:
        return learning_rate(optim, step, total)

    def pieces(step: int, first: int) -> Iterator[tuple[list[DenseSample]]]:
        for piece in range(first, first + training.batches.accumulation):
            batch = to_device(next(batches), accelerator.device)
            seed_globals(sample_rng(training.config.run.seed, step, piece, DROP_PATH_STREAM))
            yield (batch,)

    def at_point(step: int, losses: dict[str, float]) -> None:
        nonlocal since
        raise_unless_finite(task.parameters(), step, accelerator=accelerator)
        scores = task.evaluate() if step in scored else {}
        now = time.monotonic()
        seconds, since = progress.seconds + now - since, now
        epoch = step * optim.global_batch / num_images
        row = {"epoch": epoch, "step": step, "lr": lr_at(step - 1), **losses, **scores, "seconds": seconds}
        _save(training, progress, row)
        accelerator.wait_for_everyone()

    settings = LoopSettings(
        start_step=progress.step,
        num_steps=total,
        epoch_ends=points(optim.save_every, optim, num_images) | scored,
        accumulation=training.batches.accumulation,
        clip_grad=optim.clip_grad,
        lr_at=lr_at,
        parts=True,
    )
    with bar:
        train(
            task,
            training.optimizer,
            pieces,
            settings,
            accelerator=accelerator,
            after_step=bar.update,
            after_epoch=at_point,
        )


def _save(training: Training, progress: Progress, row: dict) -> None:
    """Add a row to the progress; on one process write the files of this point.

    The state to continue from is written last, so a run that is killed in between makes the same files again.
    """
    headline = METRICS[training.metric].headline
    is_best = progress.add(row, score=headline)
    if not training.accelerator.is_main_process:
        return
    text = f"step {row['step']:,}: loss {row['loss']:.4f}"
    if headline in row:
        score = METRICS[training.metric].scores[headline]
        text += f", {score.title} {score.format(row[headline], 2)}"
        metadata = {"step": row["step"], headline: f"{row[headline]:.4f}"}
        for name in ("best", "last") if is_best else ("last",):
            training.save(training.out / f"{name}.safetensors", metadata)
    write_metrics(training.out, progress)
    save_resume(
        training.out / RESUME_FILE,
        task=training.task,
        optimizer=training.optimizer,
        ema=None,
        identity=training.identity,
        **vars(progress),
    )
    say(text)
