"""A run that is killed many times, and restarted with --resume auto, ends like the uninterrupted run.

pytest -m slow tests/train/test_restart.py -s     # -s prints the kills and the time to the next step
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import LIMIT_S, REPOSITORY, deepspeed, environment, free_port, losses

COUNTING = REPOSITORY / "tests" / "train" / "counting.py"
# An epoch of 1,400 images is 25 steps of 56.
STEPS, BATCH, EPOCH = 250, 56, 25
# A small learning rate: at 1e-2 the losses of one rank and of two are 6e-4 apart by rounding alone.
SETTINGS = [
    "optim.base_lr=1e-3",
    f"optim.epochs={STEPS / EPOCH}",
    f"optim.global_batch={BATCH}",
    "log.every_steps=1",
    "checkpoint.every_steps=5",
    "checkpoint.keep=2",
    "data.num_workers=1",
    "dist.timeout_s=15",
]
# From the signal to the last process: dist.timeout_s, and the launcher's 30 s for a rank that is stopped.
BOUND_S = 120


class Job:
    """One start of a launcher, with every process that it started."""

    def __init__(
        self,
        recipe: list[str],
        folder: Path,
        *,
        ranks: int,
        launcher: str = "deepspeed",
        more: tuple[str, ...] = (),
    ):
        self.folder, self.run_dir, self.since = folder, folder / "run", time.time()
        train = ["train", *recipe, *SETTINGS, f"run.dir={self.run_dir}", "--resume", "auto"]
        torchrun = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
        start = deepspeed(ranks) if launcher == "deepspeed" else torchrun
        self.log = folder / f"log-{len(list(folder.glob('log-*')))}"
        (folder / "samples_log").mkdir(exist_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*start, *more, str(COUNTING), *train],
                cwd=folder,
                env={**environment(), "SAMPLES_LOG": str(folder / "samples_log"), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )

    def step(self) -> int:
        """The newest step of this start, 0 before the first."""
        newest = 0
        for path in (self.folder / "samples_log").glob("*.jsonl"):
            lines = path.read_text().split("\n") if int(path.name.split("-")[0]) / 1e9 > self.since else []
            if len(lines) > 1:
                newest = max(newest, json.loads(lines[-2])["step"])
        return newest

    def wait_for_steps(self, number: int) -> bool:
        """Wait for the number-th step of this start; False if the run ended before."""
        end, first = time.monotonic() + LIMIT_S, None
        while self.process.poll() is None:
            assert time.monotonic() < end, self.log.read_text()
            step = self.step()
            first = first or step
            if first and step >= first + number:
                return True
            time.sleep(0.03)
        assert self.process.returncode == 0, self.log.read_text()
        return False

    def ranks(self) -> list[psutil.Process]:
        """The ranks, in order, without their loaders' workers."""
        by_rank = {}
        for process in self.processes():
            try:
                parent = process.parent()
                if str(COUNTING) not in process.cmdline() or parent is None:
                    continue
                parent_command = " ".join(parent.cmdline())
                if "launch" in parent_command or "torchrun" in parent_command:
                    by_rank[int(process.environ().get("RANK", -1))] = process
            except psutil.Error:
                continue
        by_rank.pop(-1, None)
        return [by_rank[rank] for rank in sorted(by_rank)]

    def victim(self, who: str) -> psutil.Process:
        """The process to kill: "runner", "launcher", "worker 0", "rank 1"."""
        runner = psutil.Process(self.process.pid)
        if who == "runner":
            return runner
        if who == "launcher":
            return next(
                child for child in runner.children() if "deepspeed.launcher.launch" in child.cmdline()
            )
        if who.startswith("worker"):
            return self.ranks()[int(who[-1])].children()[0]
        return self.ranks()[int(who[-1])]

    def processes(self) -> list[psutil.Process]:
        """Every process whose command line names the run folder."""
        return [
            process
            for process in psutil.process_iter()
            if str(self.run_dir) in " ".join(_command_of(process))
        ]

    def end(self) -> float:
        """Wait until no process is left; returns the seconds it took."""
        since = time.monotonic()
        while self.process.poll() is None or self.processes():
            assert time.monotonic() - since < BOUND_S, self.processes()
            time.sleep(0.25)
        return time.monotonic() - since


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return [] if process.status() == psutil.STATUS_ZOMBIE else process.cmdline()
    except psutil.Error:
        return []


def samples_log(folder: Path) -> list[dict]:
    """Every complete line of every rank of every start, the oldest first."""
    lines = [
        line
        for path in (folder / "samples_log").glob("*.jsonl")
        for line in path.read_text().split("\n")[:-1]
    ]
    return sorted(map(json.loads, lines), key=lambda line: line["at"])


def trained_on(folder: Path) -> dict[int, list[int]]:
    """{step: sample ids} of the last time that a step was made: what a kill lost was made again."""
    rows: dict[int, dict[int, list[int]]] = {}
    ranks_of: dict[int, int] = {}
    for line in samples_log(folder):
        if ranks_of.get(line["step"]) != line["ranks"]:
            rows[line["step"]], ranks_of[line["step"]] = {}, line["ranks"]
        rows[line["step"]][line["rank"]] = line["ids"]
    assert all(len(rows[step]) == ranks_of[step] for step in rows)
    return {
        step: [number for rank in sorted(rows[step]) for number in rows[step][rank]] for step in sorted(rows)
    }


def check_every_sample_once_an_epoch(folder: Path) -> None:
    seen = trained_on(folder)
    assert list(seen) == list(range(1, STEPS + 1))
    for first in range(1, STEPS, EPOCH):
        counts = Counter(number for step in range(first, first + EPOCH) for number in seen[step])
        assert set(counts) == set(range(1400)) and set(counts.values()) == {1}, f"epoch from step {first}"


@pytest.fixture(scope="module")
def whole(tiny_recipe, tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(tiny_recipe, folder, ranks=2)
    assert job.process.wait(timeout=LIMIT_S) == 0, job.log.read_text()
    return folder


def same_student(one: Path, other: Path) -> bool:
    expected, found = (load_file(folder / "run" / "student.safetensors") for folder in (one, other))
    return expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_twenty_kills_change_nothing(tiny_recipe, tmp_path, whole, seed):
    draw = random.Random(seed)
    kinds = [
        "rank 0",
        "rank 1",
        "launcher",
        "runner",
        "worker 0",
        "worker 1",
        "rank 0 stopped",
        "rank 1 stopped",
        "rank 0 saving",
        "rank 1 saving",
    ] * 2
    draw.shuffle(kinds)
    kills = 0
    for kind in [*kinds, None]:
        job = Job(tiny_recipe, tmp_path, ranks=2)
        if kind is None or not job.wait_for_steps(draw.randint(2, 7)):
            break
        if kind.endswith("saving"):  # the folder of a save appears before its files
            known = set((tmp_path / "run" / "checkpoints").glob("step-*"))
            end = time.monotonic() + LIMIT_S
            while (
                set((tmp_path / "run" / "checkpoints").glob("step-*")) <= known and job.process.poll() is None
            ):
                assert time.monotonic() < end
                time.sleep(0.003)
            time.sleep(draw.random() * 0.2)
        else:
            time.sleep(draw.random() * 0.4)
        if job.process.poll() is not None:
            break
        victim = job.victim(" ".join(kind.split()[:2]) if " " in kind else kind)
        os.kill(victim.pid, signal.SIGSTOP if kind.endswith("stopped") else signal.SIGKILL)
        step, took = job.step(), job.end()
        kills += 1
        lines = [line for line in job.log.read_text().splitlines() if line.startswith("dmae-ds: ")]
        print(
            f"{kind} at step {step}: all gone after {took:.1f} s, "
            f"exit code {job.process.returncode}; {lines}",
            flush=True,
        )
        assert "Traceback" not in job.log.read_text(), job.log.read_text()
        named = {"rank 0": "rank 0 (", "rank 1": "rank 1 (", "worker": "DataLoader worker"}.get(
            kind[:6], "gone"
        )
        assert any(named in line for line in lines), job.log.read_text()
        if kind not in ("launcher", "runner"):
            assert job.process.returncode not in (0, 2)
    assert job.process.wait(timeout=LIMIT_S) == 0, job.log.read_text()
    print(f"{kills} kills")
    assert kills == len(kinds)
    assert same_student(whole, tmp_path)
    assert losses(tmp_path / "run") == losses(whole / "run")
    check_every_sample_once_an_epoch(tmp_path)


@pytest.mark.slow
def test_restarts_with_other_ranks_continue_with_the_same_losses(tiny_recipe, tmp_path, whole):
    for ranks in (2, 1, 2, 1):
        job = Job(tiny_recipe, tmp_path, ranks=ranks)
        assert job.wait_for_steps(13)
        os.kill(job.ranks()[ranks - 1].pid, signal.SIGKILL)
        print(f"{ranks} ranks until step {job.step()}, all gone after {job.end():.1f} s")
    job = Job(tiny_recipe, tmp_path, ranks=2)
    assert job.process.wait(timeout=LIMIT_S) == 0, job.log.read_text()
    assert {line["ranks"] for line in samples_log(tmp_path)} == {1, 2}
    found, expected = losses(tmp_path / "run"), losses(whole / "run")
    difference = max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))
    print(f"losses within {difference:.1e}")
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.5 * expected[0]  # it learns: constant losses would agree with anything
    check_every_sample_once_an_epoch(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_time_from_a_kill_to_the_next_step(tiny_recipe, tmp_path, whole, launcher):
    """torchrun restarts by itself; `deepspeed` needs a loop around it, as launch/train.sh has."""
    job = Job(
        tiny_recipe,
        tmp_path,
        ranks=2,
        launcher=launcher,
        more=("--max_restarts", "1") if launcher == "torchrun" else (),
    )
    assert job.wait_for_steps(12)
    killed, latest = time.time(), job.step()
    os.kill(job.ranks()[1].pid, signal.SIGKILL)
    if launcher == "deepspeed":
        gone = job.end()
        job = Job(tiny_recipe, tmp_path, ranks=2)
    assert job.process.wait(timeout=LIMIT_S) == 0, job.log.read_text()
    lives = sorted((tmp_path / "samples_log").iterdir(), key=lambda path: path.name)
    born = int(lives[2].name.split("-")[0]) / 1e9  # of the restarted program, its imports of the trainer done
    again = [line for line in samples_log(tmp_path) if line["at"] > born]
    assert born > killed and again[0]["step"] <= latest + 1
    until_gone = f" ({gone:.1f} s until all is gone)" if launcher == "deepspeed" else ""
    print(
        f"{launcher}: {again[0]['at'] - killed:.1f} s from the kill to the end of the first step: "
        f"{born - killed:.1f} s until the program runs again{until_gone}",
        flush=True,
    )
    assert "rank 1 (" in "".join(path.read_text() for path in tmp_path.glob("log-*"))
    assert same_student(whole, tmp_path)
