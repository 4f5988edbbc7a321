"""Training with the teacher in stages, or spread over the ranks, is training with it on every rank: the same losses, the same student."""

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

from tests.train.conftest import LIMIT_S, command, environment, free_port, losses, run
from tests.train.test_resume import STREAM, processes_with, wait_for_step
from tests.train.test_same_curve import DRIVER

PLACEMENTS = {"replicated": [], "pipeline": STREAM, "zero3": ["teacher.placement=zero3"]}


@pytest.fixture(
    scope="module",
    params=["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero0", "zero1", "zero3"))],
)
def runs(request, tiny_recipe, tmp_path_factory):
    """30 steps with the teacher in every placement, in one start of two ranks."""
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
    start = [
        "deepspeed",
        "-q",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        str(DRIVER),
        json.dumps(recipes),
    ]
    done = run(start, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stderr


@pytest.mark.parametrize("placement", ["pipeline", "zero3"])
def test_losses_and_student_are_those_of_a_replicated_teacher(runs, placement):
    folder, said = runs
    assert (
        "in 2 stages; this rank has stage 1, blocks 1-2" in said and "spread over 2 ranks by ZeRO-3" in said
    )
    assert len(losses(folder / "replicated")) == 30
    if placement == "zero3":  # fetched weights lie elsewhere in memory, and matrix products may round by that
        assert losses(folder / placement) == pytest.approx(losses(folder / "replicated"), rel=1e-5)
        return
    assert losses(folder / placement) == losses(folder / "replicated")
    one, other = (load_file(folder / name / "student.safetensors") for name in ("replicated", placement))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_rank_killed_in_mid_stream_ends_the_job_and_the_others_name_it(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    recipe = [*tiny_recipe, "optim.epochs=50", "log.every_steps=1", f"run.dir={folder}", *STREAM]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            command(["train", *recipe], ranks=2),
            cwd=tmp_path,
            env=environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    wait_for_step(folder, 5, process, tmp_path / "said")
    victims = [
        number
        for number in processes_with(str(folder))
        if "--local_rank=1" in Path(f"/proc/{number}/cmdline").read_text()
    ]
    os.kill(min(victims), signal.SIGKILL)  # the others are its loader's workers
    assert process.wait(timeout=LIMIT_S) != 0
    message = (tmp_path / "said").read_text()
    (line,) = [line for line in message.splitlines() if line.startswith("dmae-ds: error")]
    assert re.fullmatch(
        rf"dmae-ds: error: rank 1 \({re.escape(socket.gethostname())}\) is gone; its last report was step \d+, .*; continue with --resume auto",
        line,
    ), line
    assert "Traceback" not in message
    end = time.monotonic() + LIMIT_S
    while processes_with(str(folder)):  # the dead rank's workers notice by themselves
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    "more, words",
    [
        (["teacher.placement=pipeline"], "a pipeline needs a number of stages"),
        (["teacher.stages=2"], "nothing else has one"),
        (
            ["teacher.placement=pipeline", "teacher.stages=2"],
            "teacher.stages 2 does not divide the 1 ranks into groups; take one of 1",
        ),
    ],
)
def test_stages_that_can_not_be_are_one_line(tiny_recipe, tmp_path, more, words):
    done = run(command(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", *more], ranks=1), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert words in line
