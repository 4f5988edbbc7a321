"""A run that is killed or stopped, and resumed, ends bit for bit with the uninterrupted run's weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import LIMIT_S, command, environment, losses, metrics, run

STEPS = 30
# Large enough for a step to last longer than the poll below; saved every 5 steps.
LARGER = [
    f"optim.epochs={STEPS * 64 / 1400}",
    "optim.global_batch=64",
    "student.embed_dim=128",
    "log.every_steps=1",
    "checkpoint.every_steps=5",
    "checkpoint.keep=2",
]


def train(recipe: list[str], run_dir: Path, *, ranks: int, resume: str = "never") -> None:
    done = run(
        command(["train", *recipe, *LARGER, f"run.dir={run_dir}", "--resume", resume], ranks=ranks),
        cwd=run_dir.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def processes_with(text: str) -> list[int]:
    """Processes whose command line contains a text: launcher, ranks and loader workers of one run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, log: Path) -> None:
    """Return as soon as a run has logged a step."""
    end = time.monotonic() + LIMIT_S
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, "the run never came to the step"
        time.sleep(0.002)


def stop_at_step(recipe: list[str], run_dir: Path, step: int, *, ranks: int) -> None:
    """Start a run and send SIGUSR1 to its last rank once it has logged a step; check that all ranks save."""
    arguments = command(["train", *recipe, *LARGER, f"run.dir={run_dir}", "--resume", "auto"], ranks=ranks)
    with open(run_dir.parent / "stopped.log", "wb") as log:
        process = subprocess.Popen(arguments, cwd=run_dir.parent, env=environment(), stdout=log, stderr=log)
    wait_for_step(run_dir, step, process, run_dir.parent / "stopped.log")
    workers = {
        number
        for number in processes_with(str(run_dir))
        if b"--local_rank=1" in Path(f"/proc/{number}/cmdline").read_bytes()
    }
    os.kill(min(workers), signal.SIGUSR1)  # the others are its loader's workers
    assert process.wait(timeout=LIMIT_S) == os.EX_TEMPFAIL
    (line,) = [
        line
        for line in (run_dir.parent / "stopped.log").read_text().splitlines()
        if line.startswith("dmae-ds: ")
    ]
    saved = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert f"step {saved} " in line and "--resume auto" in line
    assert not processes_with(str(run_dir))


def kill_at_step(
    recipe: list[str], run_dir: Path, step: int, *, ranks: int, more: list[str] = LARGER
) -> None:
    """Start a run and SIGKILL everything of it as soon as it has logged a step."""
    arguments = command(["train", *recipe, *more, f"run.dir={run_dir}", "--resume", "auto"], ranks=ranks)
    with open(run_dir.parent / "killed.log", "wb") as log:
        process = subprocess.Popen(arguments, cwd=run_dir.parent, env=environment(), stdout=log, stderr=log)
    wait_for_step(run_dir, step, process, run_dir.parent / "killed.log")
    while victims := processes_with(str(run_dir)):
        for victim in victims:
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
    process.wait()


STREAM = ["teacher.placement=pipeline", "teacher.stages=2"]


# oneDNN once: the resumed run has `linear: auto`, and must choose the kernels that the run started with.
@pytest.mark.parametrize(
    "ranks, more, at_start",
    [
        pytest.param(1, [], ["linear=onednn"], id="alone", marks=pytest.mark.slow),
        pytest.param(2, STREAM, [], id="2 ranks, streamed teacher, also stopped"),
    ],
)
def test_killed_and_resumed_is_bit_identical(tiny_recipe, tmp_path, ranks, more, at_start):
    tiny_recipe = [*tiny_recipe, *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train([*tiny_recipe, *at_start], whole, ranks=ranks)
    if ranks == 2:
        stop_at_step(tiny_recipe, killed, 8, ranks=ranks)
    kill_at_step([*tiny_recipe, *at_start], killed, 17, ranks=ranks)
    latest = killed / "checkpoints" / (killed / "checkpoints" / "latest").read_text()
    resumed_from = json.loads((latest / "state.json").read_text())
    assert 5 <= resumed_from["step"] < STEPS
    assert resumed_from["position"] == 64 * resumed_from["step"]
    train(tiny_recipe, killed, ranks=ranks, resume="auto")

    expected, found = load_file(whole / "student.safetensors"), load_file(killed / "student.safetensors")
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in metrics(killed)] == list(range(1, STEPS + 1))
    assert losses(killed) == losses(whole)
    kept = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
    assert kept == ["step-00000025", "step-00000030"]
