"""A cluster engineer: check of a machine, two ranks, a stop, a resume, other launchers; on one machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.train.conftest import LIMIT_S, environment, free_port
from tests.users.conftest import SMALL, TEACHER, json_lines, save_teacher

pytestmark = pytest.mark.slow


def test_two_ranks_that_are_stopped_and_continued(shell, digits):
    folder = shell.folder
    save_teacher(folder / "teacher.safetensors")
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    recipe = [
        "digits_dmae",
        "teacher.weights=teacher.safetensors",
        "teacher.format=timm",
        *TEACHER,
        *data,
        *SMALL,
    ]
    shell("dmae-ds launch-files files")
    assert (folder / "files" / "launch" / "train.sh").exists()
    shell("dmae-ds launch-files files")  # equal files stay

    shell("dmae-ds doctor", *recipe, "run.dir=runs/two")
    launcher = [
        "deepspeed",
        "-q",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "dmae_ds",
    ]
    words = ["train", *recipe, "run.dir=runs/two", "optim.epochs=2", "--resume", "auto"]
    log = folder / "runs" / "two" / "metrics.jsonl"
    process = subprocess.Popen(
        [*launcher, *words], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    limit = time.monotonic() + LIMIT_S
    while not log.exists() or not log.read_text().strip():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=LIMIT_S)[0].decode()
    assert "Traceback" not in text, text
    stopped = len(log.read_text().splitlines())
    assert "saved step-" in text and stopped < 175

    # It goes on alone, with another rate, which the start names; once more, it is finished.
    shell("dmae-ds", *words, "optim.base_lr=2e-3")
    assert "optim.base_lr" in shell.text and "resharded" in shell.text
    steps = [line["step"] for line in json_lines(log)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == 175
    assert "finished" in shell("dmae-ds", *words, "optim.base_lr=2e-3")
    starts = json_lines(folder / "runs" / "two" / "starts.jsonl")
    assert len(starts) >= 2 and starts[-1]["config"]["optim"]["base_lr"] == 2e-3

    # Processes that nobody told of each other don't train the same run twice; under torchrun they share work.
    done = subprocess.run(
        [sys.executable, "-m", "dmae_ds", "train", *recipe, "run.dir=runs/srun"],
        cwd=folder,
        env={
            **environment(),
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (folder / "runs" / "srun").exists()
    torchrun = f"torchrun --nproc_per_node 2 --master_port {free_port()} -m dmae_ds"
    shell(f"{torchrun} eval knn runs/two")
    assert json.loads((folder / "runs/two/results.jsonl").read_text().splitlines()[-1])["world_size"] == 2
    shell("dmae-ds checkpoint verify runs/two")


def test_a_plan_for_64_gpus(shell):
    shell("dmae-ds plan dmae_vit_large_to_base --gpus 64 --gpu h100")
    for word in ("8 a node", "hours", "GPU h", "images/s", "GB/s"):
        assert word in shell.text, word
    few = len(shell.text.splitlines())
    assert len(shell("dmae-ds plan dmae_vit_large_to_base --gpus 64 --gpu h100 --all").splitlines()) > few
    assert "h100" in shell("dmae-ds plan dmae_vit_large_to_base --gpus 64 --gpu h1000", code=2)
