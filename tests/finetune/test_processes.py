"""Evaluations in real processes: killed with SIGKILL and resumed, and two under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.evaluate.results import read_results
from tests.finetune.conftest import PLAIN, QUICK, finetune
from tests.finetune.test_run import assert_same_outcome
from tests.train.conftest import LIMIT_S, environment, free_port

LONGER = ["optim.epochs=12"]  # thirty steps; files are saved every two or three


def start(launcher, run, *overrides):
    arguments = [*launcher, "-m", "dmae_ds", "eval", "finetune", str(run), *QUICK, *overrides]
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


def test_killed_with_sigkill_and_resumed_it_ends_bit_for_bit_the_same(run, tmp_path):
    out = tmp_path / "killed"
    process = start([sys.executable], run, *LONGER, f"run.dir={out}")
    end = time.monotonic() + LIMIT_S
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "the evaluation never came to its third epoch"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert metrics.read_bytes().count(b"\n") < 12
    finetune(run, *LONGER, f"run.dir={out}", resume="auto")
    finetune(run, *LONGER, f"run.dir={tmp_path / 'whole'}")
    assert_same_outcome(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["ema=0.9"], PLAIN], ids=["all draws", "averaged", "no draws"])
def test_two_processes_compute_what_one_accumulates(run, tmp_path, overrides):
    """Pieces of four have the same mixes and dropped paths on any process; a low rate limits rounding."""
    shared = [*overrides, "optim.micro_batch=4", "optim.base_lr=1e-3"]
    finetune(run, *shared, f"run.dir={tmp_path / 'one'}")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    process = start(launcher, run, *shared, f"run.dir={tmp_path / 'two'}")
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    assert output.count("finetune top-1") == 1
    expected, actual = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("positives", ["exact", "relax"])
def test_crd_has_one_memory_over_all_processes(run, tmp_path, positives):
    finetune(run, f"run.dir={tmp_path / 'teacher'}")
    shared = ["--recipe", "supervised_crd", f"distill.teacher={tmp_path / 'teacher' / 'best.safetensors'}"]
    shared += [*PLAIN, "optim.base_lr=1e-3", "distill.crd.num_negatives=30", "distill.crd.dim=8"]
    shared += [f"distill.crd.positives={positives}", "optim.micro_batch=4"]
    states = []
    for num in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num)]
        launcher += ["--master_port", str(free_port())]
        process = start(launcher, run, *shared, f"run.dir={tmp_path / str(num)}")
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
        states.append(torch.load(tmp_path / str(num) / "resume.pt", weights_only=True)["task"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-5)
    changed = (states[0]["memory_student"].norm(dim=1) - 1).abs() < 1e-5
    assert changed.all()  # every image was seen


@pytest.mark.slow
def test_fine_tuning_a_digits_student_is_better_than_its_knn(digits, tmp_path):
    run = tmp_path / "run"
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    for arguments in (
        [
            "train",
            "digits_mae",
            f"run.dir={run}",
            *data,
            "optim.epochs=2",
            "optim.warmup_epochs=0.5",
            "log.trackers=[]",
        ],
        ["eval", "knn", str(run)],
        ["eval", "finetune", str(run), "--recipe", "finetune_digits", "optim.epochs=10"],
    ):
        subprocess.run(
            [sys.executable, "-m", "dmae_ds", *arguments],
            check=True,
            env=environment(),
            capture_output=True,
            timeout=LIMIT_S,
        )
    top1 = {result["metric"]: result["scores"]["top1"] for result in read_results(run)}
    assert top1["finetune"] > top1["knn"] + 5
