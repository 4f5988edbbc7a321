"""Training loop: takes micro-batches with their teacher features and makes optimizer steps.

It knows neither the objective nor the teacher, only a stream of inputs and an engine that takes them.
"""

from __future__ import annotations

from typing import Callable, Iterable

from torch import Tensor

from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.async_flags import AsyncFlags
from dmae_ds.errors import Requeue
from dmae_ds.models.masking import PatchBatch
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher
from dmae_ds.train.engine import Engine
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.schedule import Schedule
from dmae_ds.train.stop import StopRequest


def train(
    engine: Engine,
    stream: Iterable[tuple[Batch, PatchBatch, dict[str, Tensor]]],
    *,
    schedule: Schedule,
    start_step: int,
    ema: EmaTeacher | NoEmaTeacher,
    metric_logger: MetricLogger,
    checkpoints: Checkpoints,
    stop: StopRequest,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train from start_step to the schedule's last step.

    stream: yields the micro-batches of these steps with their teacher features
    stop: whether this rank was asked to stop; a request to any rank stops all of them one step later, after
        a save
    after_step: called with the number of finished steps after each of them; where it raises an error that all
        ranks have met, the step is saved first
    Raises RunFailed when a loss is not finite; nothing is saved after such a step. Raises Requeue, on every
    rank, after a stop.
    """
    flags = AsyncFlags(3, engine.device)

    def save_step(step: int) -> None:
        process_group.report(step, "saving")
        with metric_logger.timer.booking("save"):
            checkpoints.save(engine, step=step, position=step * schedule.global_batch)

    process_group.report(start_step, "waiting for data")
    for index, (batch, masked, features) in enumerate(stream):
        finished, micro_batch = divmod(index, schedule.accumulation)
        finished += start_step
        if micro_batch == 0:
            engine.objective.start_step(schedule.progress_at(finished))
            engine.set_lr(schedule.lr_at(finished))
        process_group.report(finished, "training")
        losses = engine.train_micro_batch(masked, {**features, **ema.features(masked)})
        metric_logger.add({**losses, **engine.objective.gradient_shares()}, batch.sample_ids)
        if micro_batch + 1 < schedule.accumulation:
            process_group.report(finished, "waiting for data")
            continue
        step = finished + 1
        ema.after_step(engine, schedule.progress_at(finished), schedule.progress_at(step))
        metric_logger.end_step(step, schedule.lr_at(finished))
        process_group.report(step, "after the step")
        try:
            after_step(step)
        except Exception as error:
            # An evaluation failed. The step is whole; with other ranks that wait for this one, no save works.
            if collectives.world_size() == 1 or getattr(error, "on_every_rank", False):
                metric_logger.flush()  # raises for a loss that is not finite, which explains more
                save_step(step)
            raise
        is_last = step == schedule.num_steps
        must_stop, is_due, is_late = flags.result()
        save = is_last or must_stop or is_due or checkpoints.due_by_steps(step)
        if not is_last and not must_stop:  # a request that comes now takes effect after the next step
            time_to_save = collectives.is_main() and not save and checkpoints.due_by_time()
            flags.reduce([bool(stop), time_to_save, metric_logger.is_late()])
        if save or is_late or step % schedule.log_every == 0:
            metric_logger.flush()
        if save:
            save_step(step)
        if must_stop and not is_last:
            raise _requeue(step)
        process_group.report(step, "waiting for data")


def _requeue(step: int) -> Requeue:
    error = Requeue(
        f"after step {step} on request; checkpoint saved. Run the same command with --resume auto to continue"
    )
    error.on_every_rank = True
    return error
