"""Losses and students are the same with the teacher in stages, partitioned, or on every rank."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import LIMIT_S, command, deepspeed, environment, losses, refusal, run
from tests.train.test_resume import STREAM, processes_with, wait_for_step
from tests.train.test_same_curve import DRIVER

PLACEMENTS = {"replicated": [], "pipeline": STREAM, "zero3": ["teacher.placement=zero3"]}


@pytest.fixture(
    scope="module",
    params=["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero0", "zero1", "zero3"))],
)
def runs(request, tiny_recipe, tmp_path_factory):
    """Runs of 30 steps with the teacher in every placement, in one start of two ranks; and their stderr."""
    folder = tmp_path_factory.mktemp(request.param)
    recipes = [
        [
            *tiny_recipe,
            f"deepspeed={request.param}",
            f"optim.epochs={(30 * 16 - 1) / 1400}",
            f"run.dir={folder / name}",
            *more,
        ]
        for name, more in PLACEMENTS.items()
    ]
    done = run([*deepspeed(2), str(DRIVER), json.dumps(recipes)], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


@pytest.mark.parametrize("placement", ["pipeline", "zero3"])
def test_losses_and_student_are_those_of_a_replicated_teacher(runs, placement):
    folder, stderr = runs
    assert "2 stages" in stderr and "blocks 1-2" in stderr and "2 ranks as by ZeRO-3" in stderr
    assert len(losses(folder / "replicated")) == 30
    if torch.cuda.is_available():  # attention's backward adds up in any order
        assert losses(folder / placement) == pytest.approx(losses(folder / "replicated"), rel=1e-3)
        return
    assert losses(folder / placement) == losses(folder / "replicated")
    one, other = (load_file(folder / name / "student.safetensors") for name in ("replicated", placement))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_rank_killed_in_the_pipeline_ends_the_job_and_is_named(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    recipe = [*tiny_recipe, "optim.epochs=50", "log.every_steps=1", f"run.dir={folder}", *STREAM]
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(["train", *recipe], ranks=2),
            cwd=tmp_path,
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    wait_for_step(folder, 5, process, log)
    victims = [
        number
        for number in processes_with(str(folder))
        if "--local_rank=1" in Path(f"/proc/{number}/cmdline").read_text()
    ]
    os.kill(min(victims), signal.SIGKILL)  # the others are its loader's workers
    assert process.wait(timeout=LIMIT_S) != 0
    text = log.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("dmae-ds: error")]
    assert f"rank 1 ({socket.gethostname()})" in line and "--resume auto" in line
    assert re.search(r"step \d+", line)
    assert "Traceback" not in text
    end = time.monotonic() + LIMIT_S
    while processes_with(str(folder)):  # the workers of the dead rank end by themselves
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    "more, words",
    [
        (["teacher.placement=pipeline"], ["pipeline", "stages"]),
        (["teacher.stages=2"], ["stages", "pipeline"]),
        (["teacher.placement=pipeline", "teacher.stages=2"], ["teacher.stages 2", "1 ranks", "one of 1"]),
    ],
)
def test_impossible_stages_are_refused(tiny_recipe, tmp_path, more, words):
    line = refusal(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", *more], tmp_path)
    assert all(word in line for word in words), line
