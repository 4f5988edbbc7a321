"""Segmenters in real processes: killed with SIGKILL and resumed on 1 and 2 ranks; 2 ranks are 1 rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.dense.conftest import QUICK, SMALL_HEAD, assert_same_outcome, rows, segment
from tests.train.conftest import LIMIT_S, environment, free_port

LONGER = ["optim.length=40", "optim.evaluate_every=10"]


def start(run, *overrides, ranks):
    launcher = [sys.executable]
    if ranks > 1:
        torchrun = [
            "torch.distributed.run",
            "--nproc_per_node",
            str(ranks),
            "--master_port",
            str(free_port()),
        ]
        launcher += ["-m", *torchrun]
    arguments = [*launcher, "-m", "dmae_ds", "eval", "segment", str(run), *QUICK, *SMALL_HEAD, *overrides]
    alone = {**environment(), "OMP_NUM_THREADS": "1"}
    alone.pop("ACCELERATE_USE_CPU", None)  # as users start it
    return subprocess.Popen(
        arguments,
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


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_with_sigkill_and_resumed_it_ends_bit_for_bit_the_same(scene_run, tmp_path, ranks):
    out = tmp_path / "killed"
    process = start(scene_run, *LONGER, f"run.dir={out}", ranks=ranks)
    end, metrics = time.monotonic() + LIMIT_S, out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the training never came to its third line"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics.read_bytes().count(b"\n") < 20
    if ranks > 1:
        time.sleep(2)  # torchrun's workers, which lost their parent, end by themselves
    assert "segment mIoU" in finish(
        start(scene_run, *LONGER, f"run.dir={out}", "--resume", "auto", ranks=ranks)
    )
    finish(start(scene_run, *LONGER, f"run.dir={tmp_path / 'whole'}", ranks=ranks))
    assert_same_outcome(tmp_path / "whole", out)


@pytest.mark.slow
def test_two_ranks_compute_what_one_computes_with_the_whole_batch(scene_run, tmp_path):
    """Also the batch norms, whose statistics are of all ranks; without draws, which are keyed by pieces."""
    shared = ["drop_path=0", "optim.lr=1e-4"]
    segment(scene_run, *shared, f"run.dir={tmp_path / 'one'}")
    finish(start(scene_run, *shared, f"run.dir={tmp_path / 'two'}", ranks=2))
    expected, actual = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                actual[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
