"""The training loop: micro-batches with their teacher features in, optimiser steps out.

It knows neither the objective nor the teacher: it sees batches, a stream that adds features, an engine that takes both.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator

import torch

from dmae_ds import dist
from dmae_ds.data.batch import Batch
from dmae_ds.models.masking import MaskedBatch
from dmae_ds.train.checkpoint import Checkpoints
from dmae_ds.train.engine import Engine
from dmae_ds.train.metrics import Recorder


def masked_batches(batches: Iterable[Batch], prepare: Callable, normalize: torch.nn.Module, device: torch.device) -> Iterator[tuple[Batch, MaskedBatch]]:
    """Move each micro-batch to the device and draw its mask there."""
    for batch in batches:
        batch = batch.to(device)
        yield batch, prepare(batch.images, batch.noise, normalize)


def train(
    engine: Engine,
    stream: Iterable[tuple[Batch, MaskedBatch, dict]],
    *,
    recorder: Recorder,
    checkpoints: Checkpoints,
    lr_at: Callable[[int], float],
    start_step: int,
    num_steps: int,
    accumulation: int,
    global_batch: int,
    log_every: int,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Run from start_step to num_steps; `stream` yields accumulation * (num_steps - start_step) micro-batches.

    lr_at: finished steps -> the rate of the next one; after_step: is told the number of finished steps, after each
    Raises RunFailed when a loss is not finite; nothing is saved after such a step.
    """
    for index, (batch, masked, features) in enumerate(stream):
        finished, micro_batch = start_step + index // accumulation, index % accumulation
        if micro_batch == 0:
            engine.set_lr(lr_at(finished))
        parts = engine.train_micro_batch(masked, features)
        recorder.add({**parts, **engine.objective.gradient_shares()}, batch.sample_ids)
        if micro_batch + 1 < accumulation:
            continue
        step = finished + 1
        recorder.end_step(step, lr_at(finished))
        after_step(step)
        last, save = step == num_steps, checkpoints.due_by_steps(step)
        if last or save or step % log_every == 0:
            recorder.flush()
            save = save or dist.main_says(checkpoints.due_by_time())
        if last or save:
            checkpoints.save(engine, step=step, position=step * global_batch)
