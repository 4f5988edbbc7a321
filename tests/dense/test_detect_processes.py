"""Detectors in real processes: killed with SIGKILL and resumed on 1 and 2 ranks, and 2 ranks equal to 1."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.dense.conftest import assert_same_outcome, rows
from tests.dense.detectors import arguments, detect, make_student
from tests.train.conftest import LIMIT_S, environment, free_port

pytestmark = pytest.mark.slow
LONGER = ["optim.length=6", "optim.evaluate_every=2", "optim.micro_batch=4"]  # 18 steps, saved every 3


def start(num_ranks, weights, overrides):
    """Start `dmae-ds eval detect` as users do, in a process group of its own."""
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        launcher += ["--master_port", str(free_port())]
    alone = {**environment(), "OMP_NUM_THREADS": "1"}
    alone.pop("ACCELERATE_USE_CPU", None)
    return subprocess.Popen(
        [*launcher, "-m", "dmae_ds", "eval", "detect", str(weights), "--resume", "auto", *overrides],
        env=alone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def student(tmp_path):
    return make_student(tmp_path / "student.safetensors")


@pytest.fixture
def distill(student, scenes, tmp_path):
    detect(student, scenes, tmp_path / "teacher", "optim.length=1")
    return [f"distill.teacher={tmp_path / 'teacher' / 'last.safetensors'}", "distill.warmup_steps=9"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_with_sigkill_and_resumed_it_ends_bit_for_bit_the_same(
    student, distill, scenes, tmp_path, num_ranks
):
    whole, killed = (arguments(scenes, tmp_path / name, *LONGER, *distill) for name in ("whole", "killed"))
    finish(start(num_ranks, student, whole))
    process = start(num_ranks, student, killed)
    metrics, end = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the training never came to its second save"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 2 <= len(rows(tmp_path / "killed")) < 6
    finish(start(num_ranks, student, killed))
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


def test_two_ranks_compute_what_one_accumulates(student, distill, scenes, tmp_path):
    """Pieces of four have the same crops, proposals and dropped paths on any rank.

    One step: after it, rounding may change which proposals are drawn.
    """
    shared = ["optim.micro_batch=4", "optim.length=0.3", "optim.warmup_steps=0", *distill]
    detect(student, scenes, tmp_path / "one", *shared)
    output = finish(start(2, student, arguments(scenes, tmp_path / "two", *shared)))
    assert output.count("detect box AP") == 1
    (one,), (two,) = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert one.keys() == two.keys() and one["step"] == 1
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5, abs=1e-6 if "ap" not in name else 0.1), name
    expected, actual = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        # Adam's first step is lr * sign(g), so rounding of a gradient near 0 moves a weight by up to 2 lr.
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2.1e-4, msg=name)
