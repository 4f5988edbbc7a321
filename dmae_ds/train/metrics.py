"""Logs of a run: losses are read off the device in batches and go to JSON lines, trackers and stderr.

Losses stay on the device until `flush`, so the loop never waits for one. A flush averages over ranks, so
every rank learns of a non-finite loss at the same moment.

Each line of RUN/metrics.jsonl is one step:
    step, epoch, lr, loss and its named parts
    share/<block>                    share of distillation in the gradient at a student block
    images_per_s                     of the steps since the last flush
    tflops, of_peak                  of this rank, for networks from 5 M parameters (speed.py)
    seconds/data|teacher|save|rest   where the time went (step_timer.py); a save counts to the step after it
    rank/..., spread/..., norm/...   at step 1, every log.every_steps and at the end (collapse.py)
    knn/top1, knn/top5               in percent, where eval.knn_every asks for it (knn.py)
    dense/miou                       in percent, where eval.dense_every asks for it (dense.py)
    val/loss and its parts           on data.val, where eval.loss_every asks for it (val_loss.py)
Of a family, names that belong to one student begin with its name (small/pixel, small/knn/top1), `loss` is the
sum, and RUN/small/metrics.jsonl has a student's lines as it would have them alone.
"""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from dmae_ds.config.family import prefix_of
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.lines import say
from dmae_ds.output.progress import Progress
from dmae_ds.output.units import size_text
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.collapse import CollapseMonitors
from dmae_ds.train.peak_memory import memory_now
from dmae_ds.train.schedule import Schedule
from dmae_ds.train.speed import Speed
from dmae_ds.train.step_timer import StepTimer

FILE = "metrics.jsonl"
OF_ALL = ("loss", "val/loss", "tflops", "of_peak")  # of a family: numbers of all its students together


class MemberMetrics:
    """A logger as one student of a family sees it, for numbers that are measured during training."""

    def __init__(self, logger: MetricLogger, name: str):
        self._logger, self._prefix = logger, prefix_of(name)

    def note(self, numbers: dict[str, float], *, seconds: float) -> None:
        self._logger.note(
            {f"{self._prefix}{name}": value for name, value in numbers.items()}, seconds=seconds
        )

    def flush(self) -> None:
        self._logger.flush()


class _Row(NamedTuple):
    """A finished step's numbers on this rank: `values` on the device, `seconds` of the host."""

    step: int
    lr: float
    names: list[str]
    values: Tensor
    seconds: dict[str, float]
    ids: list[Tensor]


class MetricLogger:
    """Collects each step's scalars; rank 0 writes RUN/metrics.jsonl, one line a step.

    monitor: observes the students' features in the first step, every `log_every` steps and in the last one
    members: names of the students of a family; ("",) of one
    timer: measures where the time goes; speed: compares the time of a step with the fastest matrix product
    `trackers` may be set before the first step.
    """

    def __init__(
        self,
        run_dir: Path,
        schedule: Schedule,
        *,
        is_main: bool,
        monitor: CollapseMonitors,
        timer: StepTimer,
        speed: Speed | None,
        members: Sequence[str] = ("",),
    ):
        self.path, self.schedule, self.is_main = run_dir / FILE, schedule, is_main
        self.members = [name for name in members if name]
        self.monitor, self.timer, self.speed = monitor, timer, speed
        self.trackers: list = []
        self.step = 0  # number of finished steps
        self._names: list[str] = []
        self._sums: Tensor | None = None  # over the micro-batches of the current step
        self._rows: list[_Row] = []
        self._device = torch.device("cpu")  # of the scalars
        self._notes: dict[int, dict[str, float]] = {}
        self._ids: list[Tensor] = []
        self._since = time.perf_counter()
        self._progress: Progress | None = None
        # Trackers take time (TensorBoard a millisecond a step), which the loop need not wait for.
        self._tracker_thread, self._tracked = ThreadPoolExecutor(max_workers=1), None

    def start(self, step: int) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint, and show the progress bar."""
        self.step = step
        self._activate_monitor()
        self.timer.lap()  # drops the time before the first step
        if not self.is_main:
            return
        for path in self._paths().values():
            lines = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
            write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._progress = Progress(total=self.schedule.num_steps, initial=step)

    def _paths(self) -> dict[str, Path]:
        """The files by name of the student, that of the run first, with the name ""."""
        folder = self.path.parent
        return {"": self.path, **{name: folder / name / FILE for name in self.members}}

    def add(self, scalars: dict[str, Tensor], sample_ids: Tensor) -> None:
        """Take one micro-batch's scalars, still on the device."""
        self._names = self._names or list(scalars)
        if list(scalars) != self._names:
            raise UserError(
                f"the objective's forward returned {', '.join(scalars)}, and {', '.join(self._names)} "
                "before; its names must be the same in every step"
            )
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._sums = values if self._sums is None else self._sums + values
        self._ids.append(sample_ids)

    def end_step(self, step: int, lr: float) -> None:
        """Close a step: `step` counts the finished ones, `lr` is the learning rate it was made with."""
        self.step = step
        observed = self.monitor.measure()
        values = torch.cat(
            [
                self._sums / self.schedule.accumulation,
                *(value.float().reshape(1) for value in observed.values()),
            ]
        )
        names = [*self._names, *observed]
        self._device = values.device
        self._rows.append(_Row(step, lr, names, values, self.timer.lap(), self._ids))
        self._sums, self._ids = None, []
        self._activate_monitor()
        if self._progress is not None:
            self._progress.advance()

    def note(self, numbers: dict[str, float], *, seconds: float) -> None:
        """Add numbers that all ranks agree on to the line of the step that has just ended.

        seconds: spent on measuring them; they are left out of every step's time
        """
        self._notes.setdefault(self.step, {}).update(numbers)
        if self.is_main:
            text = ", ".join(
                f"{name} {value:.4f}" if "val/" in name else f"{name} {value:.1f}%"
                for name, value in numbers.items()
            )
            say(f"step {self.step:,}: {text} ({seconds:.1f} s)")
        self._since += seconds
        self.timer.lap()

    def is_late(self) -> bool:
        """Whether rank 0 should log now, although log.every_steps have not passed; False on other ranks."""
        return self._progress is not None and self._progress.is_late()

    def flush(self) -> None:
        """Average the collected steps over ranks and write them. Collective.

        Raises RunFailed, on every rank, that names the first step with a non-finite loss and its samples.
        """
        if not self._rows:
            return
        records = self._average_rows()
        bad = next((i for i, record in enumerate(records) if not math.isfinite(record["loss"])), None)
        if self.is_main:
            self._write(records[: len(records) if bad is None else bad])
        if bad is not None:
            self._fail(self._rows[bad])
        self._rows.clear()

    def _average_rows(self) -> list[dict]:
        """One record for each collected step, the same on all ranks. Collective."""
        # Every rank's steps have the same numbers, so all of them are sent as one row of numbers.
        values = torch.cat([row.values for row in self._rows])
        seconds = [second for row in self._rows for second in row.seconds.values()]
        sent = torch.cat([values, torch.tensor(seconds, device=values.device)])
        means = iter(collectives.mean_over_ranks(sent).tolist())
        scalars_by_row = [dict(zip(row.names, means, strict=False)) for row in self._rows]
        seconds_by_row = [dict(zip(row.seconds, means, strict=False)) for row in self._rows]
        now = time.perf_counter()
        images_per_s = self.schedule.global_batch * len(self._rows) / (now - self._since)
        speed = {} if self.speed is None else self.speed.at(self.schedule.global_batch / images_per_s)
        self._since = now
        records = []
        for row, scalars, row_seconds in zip(self._rows, scalars_by_row, seconds_by_row, strict=True):
            losses = {name: scalars.pop(name) for name in self._names}
            records.append(
                {
                    "step": row.step,
                    "epoch": self.schedule.epoch_at(row.step),
                    "lr": row.lr,
                    **losses,
                    "images_per_s": images_per_s,
                    **speed,
                    **row_seconds,
                    **scalars,
                    **self._notes.pop(row.step, {}),
                }
            )
        return records

    def close(self) -> None:
        """Finish trackers and the progress bar."""
        if self._progress is not None:
            self._progress.close()
        self._tracker_thread.shutdown()  # waits until everything is tracked
        if self._tracked is not None:
            self._tracked.result()
        for tracker in self.trackers:
            tracker.finish()

    def _write(self, records: list[dict]) -> None:
        for name, path in self._paths().items():
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(self._of(name, record)) + "\n" for record in records)
        if self.trackers:
            if self._tracked is not None:
                self._tracked.result()  # raises what went wrong in the thread
            self._tracked = self._tracker_thread.submit(self._track, records)
        if self._progress is None or not records:
            return
        step = records[-1]["step"]
        # Not where it only saves.
        is_logged = step % self.schedule.log_every == 0 or step == self.schedule.num_steps
        if is_logged or self._progress.is_late():
            self._progress.show(self._shown(records))

    def _of(self, name: str, record: dict) -> dict:
        """The line of one student: numbers of all students, and its own without its name; "": everything."""
        if not name:
            return record
        mine: dict = {}
        for key, value in record.items():
            owner, _, part = key.partition("/")
            if owner == name:
                mine[part] = value
            elif owner not in self.members and key not in OF_ALL:
                mine[key] = value
        return {key: mine[key] for key in sorted(mine, key=lambda key: key not in ("step", "epoch", "lr"))}

    def _shown(self, records: list[dict]) -> dict[str, str]:
        last = records[-1]
        shown = {"epoch": f"{last['epoch']:.3g} of {self.schedule.optim.epochs:g}"}
        losses = [name for name in self._names if "share/" not in name]
        if self.members:  # a line has no room for the parts of all
            losses = [name for name in losses if name.endswith("loss")]
        shown |= {name: f"{last[name]:.4f}" for name in losses}
        data_s = sum(record.get("seconds/data", 0.0) for record in records)
        all_s = sum(
            seconds for record in records for name, seconds in record.items() if name.startswith("seconds/")
        )
        shown |= {"lr": f"{last['lr']:.2g}", "img/s": f"{last['images_per_s']:.0f}"}
        shown |= {"data": f"{data_s / all_s:.0%}", "memory": size_text(memory_now(self._device))}
        if self.speed is not None:
            shown |= {"TFLOP/s": f"{last['tflops']:.3g}", "of peak": f"{last['of_peak']:.0%}"}
        return shown

    def _track(self, records: list[dict]) -> None:
        for record in records:
            numbers = {name: value for name, value in record.items() if name != "step"}
            for tracker in self.trackers:
                tracker.log(numbers, step=record["step"])

    def _activate_monitor(self) -> None:
        """Let the monitor observe the next step if it is logged, the first or the last one."""
        following = self.step + 1
        is_logged = following % self.schedule.log_every == 0
        # The first step's features are those of the initial weights, which later ones are compared with.
        self.monitor.active = is_logged or following in (1, self.schedule.num_steps)

    def _fail(self, row: _Row) -> None:
        mine = torch.cat(row.ids).tolist() if not row.values[row.names.index("loss")].isfinite() else []
        ids_by_rank = collectives.gather_objects(mine)
        samples = "; ".join(f"rank {rank}: {_short(ids)}" for rank, ids in enumerate(ids_by_rank) if ids)
        error = RunFailed(
            f"the loss of step {row.step} is not finite; sample ids of the micro-batches: {samples}; "
            f"{CheckpointFolder(self.path.parent).ways_on()}"
        )
        error.on_every_rank = True
        raise error


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None  # half a line of a killed run


def _short(ids: list[int], limit: int = 16) -> str:
    text = ", ".join(map(str, ids[:limit]))
    return text + f", ... ({len(ids)} in all)" if len(ids) > limit else text
