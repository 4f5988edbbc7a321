"""Train one classifier on labels (fine-tuning, linear probe, supervised distillation) and measure it.

dmae-ds eval finetune RUN                                                  # one process
torchrun --nproc_per_node 8 -m dmae_ds eval finetune RUN precision=bf16    # or accelerate launch --multi_gpu
-m

OUT = RUN/<recipe>[-<labels>-seed<S>], or run.dir
OUT/config.yaml          the recipe, complete
OUT/metrics.jsonl        one line per epoch
OUT/best.safetensors     the classifier of the best epoch in timm's names (network.py)
OUT/last.safetensors     the classifier of the last epoch
OUT/resume.pt            the state that a killed run continues from
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields

from dmae_ds.config.evaluation import FinetuneConfig
from dmae_ds.config.load import dump_config
from dmae_ds.data.batch import Batch
from dmae_ds.evaluate.accuracy import measure_accuracy
from dmae_ds.evaluate.results import append_result, interval_text, make_result
from dmae_ds.evaluate.subsets import open_subset
from dmae_ds.finetune.checkpoint import RESUME_FILE, read_resume, restore
from dmae_ds.finetune.claim import claim
from dmae_ds.finetune.early import SCHEMAS, check_is_new
from dmae_ds.finetune.evaluation import Evaluation, open_evaluation
from dmae_ds.finetune.loop import LoopSettings, raise_unless_finite, train
from dmae_ds.finetune.pieces import Pieces
from dmae_ds.finetune.record import (
    Progress,
    metric_of,
    save_epoch,
    settings_of,
    step_bar,
    summary,
    write_text,
)
from dmae_ds.finetune.source import find_source
from dmae_ds.output.lines import say
from dmae_ds.train.learning_rate import learning_rate


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
    """Train a classifier by `finetune` or `linear` and add its accuracy to results.jsonl. Collective.

    word: a run folder or a weights file; resume: `auto` continues a killed run, `never` refuses a folder that
    holds one
    Returns the line of results.jsonl, with the last epoch's scores.
    Raises UserError, and RunFailed for a loss that is not finite.
    """
    source = find_source(
        word,
        schema=SCHEMAS[command],
        recipe=recipe,
        overrides=overrides,
        labels=labels,
        subset_seed=subset_seed,
    )
    evaluation = open_evaluation(source)
    accelerator = evaluation.accelerator
    identity = evaluation.identity(command)
    progress = _start_or_resume(evaluation, identity, resume)
    batches = evaluation.train_batches(start_step=progress.step)
    lock = claim(evaluation.out, evaluation.accelerator)
    now = _start_or_resume(evaluation, identity, resume)
    if now.step != progress.step:  # another job worked here while this one waited for the folder
        progress, batches = now, evaluation.train_batches(start_step=now.step)
    accelerator.wait_for_everyone()  # every process has looked at the folder before it is written to
    if accelerator.is_main_process:
        _write_start(evaluation, progress)
    _train(evaluation, progress, batches, identity=identity)
    result = make_result(
        evaluation.measured_on(),
        metric=metric_of(source.config),
        scores={name: progress.epochs[-1][name] for name in ("top1", "top5")},
        settings=settings_of(source, evaluation.classifier),
        seconds=progress.seconds,
    )
    if accelerator.is_main_process:
        append_result(source.results, result)
        print(_describe(evaluation, progress, result), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if lock is not None:
        lock.close()
    return result


def _start_or_resume(evaluation: Evaluation, identity: dict, resume: str) -> Progress:
    """Put a killed run's state back, or start with none. Raises UserError for a folder of another run."""
    saved = read_resume(evaluation.out / RESUME_FILE, identity) if resume == "auto" else None
    if resume == "never":
        check_is_new(evaluation.out)
    if saved is None:
        return Progress()
    classifier = evaluation.classifier
    restore(saved, task=classifier.task, optimizer=classifier.optimizer, ema=classifier.ema)
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def _write_start(evaluation: Evaluation, progress: Progress) -> None:
    """Write the recipe and the drawn labels, and print a summary. Call it on one process."""
    config, source = evaluation.config, evaluation.source
    evaluation.out.mkdir(parents=True, exist_ok=True)
    open_subset(
        source.results, evaluation.train_set, labels=config.labels, seed=config.subset_seed, write=True
    )
    write_text(evaluation.out / "config.yaml", dump_config(config))
    say(summary(evaluation, start_step=progress.step), dated=False)


def _train(evaluation: Evaluation, progress: Progress, batches: Iterator[Batch], *, identity: dict) -> None:
    """Train to the last step; validate and save after every epoch."""
    config, classifier, accelerator = evaluation.config, evaluation.classifier, evaluation.accelerator
    prepare, accumulation = evaluation.prepare, evaluation.accumulation
    pieces = Pieces(classifier.task, batches, prepare, accumulation=accumulation, accelerator=accelerator)
    bar = step_bar(evaluation.num_steps, done=progress.step, is_main=accelerator.is_main_process)
    since = time.monotonic()

    def lr_at(step: int) -> float:
        return learning_rate(config.optim, step / evaluation.steps_per_epoch)

    def after_step() -> None:
        pieces.after_step()
        if classifier.ema is not None:
            classifier.ema.update(classifier.network)
        bar.update()

    def after_epoch(step: int, losses: dict[str, float]) -> None:
        nonlocal since
        raise_unless_finite(classifier.tensors().values(), step, accelerator=accelerator)
        top1, top5 = measure_accuracy(
            classifier.judged,
            evaluation.val_batches(),
            normalize=prepare.normalize,
            num_classes=len(evaluation.train_set.classes),
            processes=accelerator,
        )
        now = time.monotonic()
        seconds, since = progress.seconds + now - since, now
        row = {
            "epoch": step / evaluation.steps_per_epoch,
            "step": step,
            "lr": lr_at(step - 1),
            **losses,
            "top1": top1,
            "top5": top5,
            "seconds": seconds,
        }
        is_best = progress.add(row)
        if accelerator.is_main_process:
            save_epoch(evaluation.out, classifier, config, progress, identity=identity, is_best=is_best)
            second = "" if top5 is None else f", top-5 {top5:.2f}%"
            text = f"epoch {row['epoch']:.4g}: loss {row['loss']:.4f}, top-1 {top1:.2f}%{second}"
            say(text)
        accelerator.wait_for_everyone()

    settings = LoopSettings(
        start_step=progress.step,
        num_steps=evaluation.num_steps,
        epoch_ends=evaluation.epoch_ends(),
        accumulation=accumulation,
        clip_grad=config.optim.clip_grad if isinstance(config, FinetuneConfig) else 0.0,
        lr_at=lr_at,
    )
    with bar:
        train(
            classifier.task,
            classifier.optimizer,
            pieces,
            settings,
            accelerator=accelerator,
            after_step=after_step,
            after_epoch=after_epoch,
        )


def _describe(evaluation: Evaluation, progress: Progress, result: dict) -> str:
    """The line that is printed at the end."""
    best = max(row["top1"] for row in progress.epochs)
    epochs = f"last of {evaluation.config.optim.epochs:g} epochs; best {best:.1f}%"
    images = f"{result['num_train']} train, {result['num_val']} val"
    score = result["scores"]["top1"]
    top1 = f"{result['metric']} top-1 {score:.1f}%, {interval_text(score, result['num_val'])}"
    return f"{top1} ({evaluation.source.recipe}, {epochs}), {images}: {evaluation.out}"
