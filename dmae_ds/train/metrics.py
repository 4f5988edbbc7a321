"""What a run says while it runs: losses read off the device in batches, JSON lines, trackers, a progress bar.

Losses stay on the device until `flush`, so the loop never waits for one. A flush averages over ranks, so every rank
learns of a non-finite loss at the same moment.

A line of RUN/metrics.jsonl is a step: step, epoch, lr, loss and its parts, share/<block>, images_per_s (of the steps since
the last flush), tflops of a rank and of_peak, its share of the fastest matrix product here (speed.py; networks from 5 M parameters), seconds/data | teacher | save | rest (clock.py; a save counts to the step after it), and every log.every_steps and at the end rank/... and norm/... (health.py),
and where eval.knn_every asks for it knn/top1 and knn/top5 in percent (knn.py).
"""

from __future__ import annotations

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed
from dmae_ds.output.durable import write_atomically
from dmae_ds.train.collapse import CollapseMonitor
from dmae_ds.train.speed import Speed
from dmae_ds.train.step_timer import StepTimer


class _Row(NamedTuple):
    """A finished step's numbers of this rank: `values` on the device, `seconds` of the host."""

    step: int
    lr: float
    names: list[str]
    values: Tensor
    seconds: dict[str, float]
    ids: list[Tensor]


class MetricLogger:
    """Collects each step's scalars; rank 0 writes RUN/metrics.jsonl, one line a step.

    global_batch and num_samples turn steps into epochs and images; accumulation is the micro-batches a step
    watch: looks at the student's features every `log_every` steps and in the last; clock: says where the time went; speed: how near that is to the fastest
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        is_main: bool,
        accumulation: int,
        global_batch: int,
        num_samples: int,
        log_every: int,
        watch: CollapseMonitor,
        timer: StepTimer,
        speed: Speed | None,
        trackers: list,
    ):
        self.path, self.is_main = run_dir / "metrics.jsonl", is_main
        self.accumulation, self.global_batch, self.num_samples = accumulation, global_batch, num_samples
        self.log_every, self.watch, self.timer, self.speed, self.trackers = (
            log_every,
            watch,
            timer,
            speed,
            trackers,
        )
        self.step = 0  # the last finished one
        self._names: list[str] = []
        self._sums: Tensor | None = None  # of the step under way
        self._rows: list[_Row] = []
        self._num_steps = 0
        self._notes: dict[int, dict[str, float]] = {}
        self._ids: list[Tensor] = []
        self._since = time.perf_counter()
        self._bar: tqdm | None = None
        # Trackers take their time (TensorBoard a millisecond a step), which needn't be the loop's.
        self._teller, self._told = ThreadPoolExecutor(max_workers=1), None

    def start(self, *, step: int, num_steps: int) -> None:
        """Drop what a killed run wrote after its last checkpoint, and show the bar."""
        self.step, self._num_steps = step, num_steps
        self._look_at_next()
        self.timer.lap()  # what came before the first step is no part of it
        if not self.is_main:
            return
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=num_steps, initial=step, unit="step", mininterval=interval, dynamic_ncols=True)

    def add(self, scalars: dict[str, Tensor], sample_ids: Tensor) -> None:
        """Take one micro-batch's scalars, still on the device."""
        self._names = self._names or list(scalars)
        assert list(scalars) == self._names
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self._sums = values if self._sums is None else self._sums + values
        self._ids.append(sample_ids)

    def end_step(self, step: int, lr: float) -> None:
        """Close a step: `step` counts the finished ones, `lr` is the rate that it was taken with."""
        self.step = step
        seen = self.watch.measure()
        values = torch.cat(
            [self._sums / self.accumulation, *(value.float().reshape(1) for value in seen.values())]
        )
        self._rows.append(_Row(step, lr, [*self._names, *seen], values, self.timer.lap(), self._ids))
        self._sums, self._ids = None, []
        self._look_at_next()
        if self._bar is not None:
            self._bar.update()

    def note(self, numbers: dict[str, float], *, seconds: float) -> None:
        """Numbers that all ranks agree on go into the line of the step that has just ended; `seconds` went into finding them, and are no part of any step."""
        self._notes[self.step] = numbers
        self._since += seconds
        self.timer.lap()

    def flush(self) -> None:
        """Average the collected steps over ranks and write them. Collective.

        Raises RunFailed, on every rank, that names the first step with a non-finite loss and its samples.
        """
        if not self._rows:
            return
        # Every rank's steps have the same numbers, so all of them travel as one row of numbers.
        seconds = torch.tensor(
            [second for row in self._rows for second in row.seconds.values()],
            device=self._rows[0].values.device,
        )
        means = iter(
            collectives.mean_over_ranks(torch.cat([*(row.values for row in self._rows), seconds])).tolist()
        )
        scalars = [dict(zip(row.names, means)) for row in self._rows]
        waits = [dict(zip(row.seconds, means)) for row in self._rows]
        now = time.perf_counter()
        images_per_s = self.global_batch * len(self._rows) / (now - self._since)
        speed = {} if self.speed is None else self.speed.at(self.global_batch / images_per_s)
        self._since = now
        records = []
        for row, found, wait in zip(self._rows, scalars, waits, strict=True):
            losses = {name: found.pop(name) for name in self._names}
            epoch = row.step * self.global_batch / self.num_samples
            records.append(
                {
                    "step": row.step,
                    "epoch": epoch,
                    "lr": row.lr,
                    **losses,
                    "images_per_s": images_per_s,
                    **speed,
                    **wait,
                    **found,
                    **self._notes.pop(row.step, {}),
                }
            )
        bad = next((i for i, record in enumerate(records) if not math.isfinite(record["loss"])), None)
        if self.is_main:
            self._write(records[: len(records) if bad is None else bad])
        if bad is not None:
            self._fail(self._rows[bad])
        self._rows.clear()

    def close(self) -> None:
        """Finish trackers and the bar."""
        if self._bar is not None:
            self._bar.close()
        self._teller.shutdown()  # once all is told
        if self._told is not None:
            self._told.result()
        for tracker in self.trackers:
            tracker.finish()

    def _write(self, records: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        if self.trackers:
            if self._told is not None:
                self._told.result()  # raises what went wrong there
            self._told = self._teller.submit(self._tell, records)
        if self._bar is not None and records:
            shown = {
                name: f"{records[-1][name]:.4f}" for name in self._names if not name.startswith("share/")
            }
            waited, spent = (
                sum(record[name] for record in records for name in record if name.startswith(kind))
                for kind in ("seconds/data", "seconds/")
            )
            shown |= {"img/s": f"{records[-1]['images_per_s']:.0f}", "data": f"{waited / spent:.0%}"}
            if self.speed is not None:
                shown |= {
                    "TFLOP/s": f"{records[-1]['tflops']:.3g}",
                    "of peak": f"{records[-1]['of_peak']:.0%}",
                }
            self._bar.set_postfix(shown, refresh=False)

    def _tell(self, records: list[dict]) -> None:
        for record in records:
            for tracker in self.trackers:
                tracker.log(
                    {name: value for name, value in record.items() if name != "step"}, step=record["step"]
                )

    def _look_at_next(self) -> None:
        self.watch.active = (self.step + 1) % self.log_every == 0 or self.step + 1 == self._num_steps

    def _fail(self, row: _Row) -> None:
        mine = torch.cat(row.ids).tolist() if not row.values[row.names.index("loss")].isfinite() else []
        samples = collectives.gather_objects(mine)
        where = "; ".join(f"rank {rank}: {_short(ids)}" for rank, ids in enumerate(samples) if ids)
        error = RunFailed(
            f"the loss of step {row.step} is not finite; sample ids of the micro-batches it came from: {where}; the last checkpoint is untouched"
        )
        error.on_every_rank = True
        raise error


def build_trackers(names: list[str], run_dir: Path) -> list:
    """accelerate's trackers by name, logging under the run folder. Call on rank 0 alone."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    trackers = []
    for name in names:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        directory = (
            {"logging_dir": run_dir / "tensorboard"} if tracker_class.requires_logging_directory else {}
        )
        tracker = tracker_class(run_dir.name, **directory)
        tracker.start()
        trackers.append(tracker)
    return trackers


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None  # the half line of a killed run


def _short(ids: list[int], limit: int = 16) -> str:
    return ", ".join(map(str, ids[:limit])) + (f", ... ({len(ids)} in all)" if len(ids) > limit else "")
