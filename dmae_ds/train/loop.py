"""The training loop: micro-batches with their teacher features in, optimiser steps out.

It knows neither the objective nor the teacher: it sees batches, a stream that adds features, an engine that takes both.
"""

from __future__ import annotations

from typing import Callable, Iterable

from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.async_flags import AsyncFlags
from dmae_ds.errors import Requeue
from dmae_ds.models.masking import PatchBatch
from dmae_ds.objectives.needs import Progress
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.ema import EmaTeacher
from dmae_ds.train.engine import Engine
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.stop import StopRequest


def train(
    engine: Engine,
    stream: Iterable[tuple[Batch, PatchBatch, dict]],
    *,
    metric_logger: MetricLogger,
    checkpoints: Checkpoints,
    lr_at: Callable[[int], float],
    progress_at: Callable[[int], Progress],
    ema: EmaTeacher | None,
    start_step: int,
    num_steps: int,
    accumulation: int,
    global_batch: int,
    log_every: int,
    stop: StopRequest,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Run from start_step to num_steps; `stream` yields accumulation * (num_steps - start_step) micro-batches.

    lr_at, progress_at: finished steps -> the rate of the next one, and how far the run is; EMA teacher: where the objective has one; after_step: is told the number of finished steps, after each
    stop: whether this rank was told to; any rank's request is met by all, one step later, with a save
    Raises RunFailed when a loss is not finite; nothing is saved after such a step. Raises Requeue, on every rank, after a stop.
    """
    flags = AsyncFlags(2, engine.device)
    process_group.report(start_step, "waiting for data")
    for index, (batch, masked, features) in enumerate(stream):
        finished, micro_batch = start_step + index // accumulation, index % accumulation
        if micro_batch == 0:
            engine.objective.start_step(progress_at(finished))
            engine.set_lr(lr_at(finished))
        process_group.report(finished, "training")
        if ema is not None:
            features = {**features, **ema.features(masked)}
        parts = engine.train_micro_batch(masked, features)
        metric_logger.add({**parts, **engine.objective.gradient_shares()}, batch.sample_ids)
        if micro_batch + 1 < accumulation:
            process_group.report(finished, "waiting for data")
            continue
        step = finished + 1
        if ema is not None:
            ema.after_step(engine, progress_at(finished), progress_at(step))
        metric_logger.end_step(step, lr_at(finished))
        process_group.report(step, "after the step")
        after_step(step)
        last = step == num_steps
        stopped, due = flags.result()
        save = last or stopped or due or checkpoints.due_by_steps(step)
        if not last and not stopped:  # whoever is told to stop now is heard after the next step
            flags.reduce([bool(stop), collectives.is_main() and not save and checkpoints.due_by_time()])
        if save or step % log_every == 0:
            metric_logger.flush()
        if save:
            process_group.report(step, "saving")
            with metric_logger.timer.booking("save"):
                checkpoints.save(engine, step=step, position=step * global_batch)
        if stopped and not last:
            error = Requeue(
                f"after step {step}, as it was told to; saved, and the same command with --resume auto goes on"
            )
            error.on_every_rank = True
            raise error
        process_group.report(step, "waiting for data")
