"""Runs whose checkpoints continue at another world size or ZeRO stage, started under a real launcher."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import free_port, losses, run

DRIVER = Path(__file__).with_name("reshard_driver.py")
STEPS, SAVED = 6, 3
NEAR = 1e-4
# Accumulation everywhere except on 4 ranks; with this weight decay a parameter in the wrong group shows.
OVERRIDES = [
    "optim.micro_batch=4",
    "optim.weight_decay=5",
    "data.num_workers=0",
    "log.every_steps=1",
    "checkpoint.every_minutes=null",
]


def train(recipe: list[str], folder: Path, *more: str) -> list[str]:
    batch = next(
        int(option.split("=")[1]) for option in reversed(recipe) if option.startswith("optim.global_batch=")
    )
    return [
        "train",
        *recipe,
        *OVERRIDES,
        f"optim.epochs={(STEPS * batch - 1) / 1400}",
        "checkpoint.every_steps=3",
        f"run.dir={folder}",
        *more,
    ]


def source(recipe: list[str], folder: Path, stage: int, ranks: int, *more: str) -> list[str]:
    return train(recipe, folder / f"{ranks}x{stage}", f"deepspeed=zero{stage}", *more)


def move(
    recipe: list[str], folder: Path, *, ranks: tuple[int, int], stages: tuple[int, int]
) -> list[list[str]]:
    other = folder / f"{ranks[0]}x{stages[0]}-{ranks[1]}x{stages[1]}"
    return [
        ["take", str(folder / f"{ranks[0]}x{stages[0]}"), SAVED, str(other)],
        train(recipe, other, f"deepspeed=zero{stages[1]}"),
    ]


def start(steps: list[list], *, ranks: int, cwd: Path, script: str = "") -> subprocess.CompletedProcess:
    """Do the steps with so many ranks.

    script: bash that runs them as "$@", in a mount namespace of its own.
    """
    launcher = [sys.executable]
    if ranks > 1:  # torchrun starts sooner than deepspeed
        launcher = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, str(DRIVER), json.dumps(steps)]
    done = run(["unshare", "-m", "bash", "-ec", script, "-", *command] if script else command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done


def assert_same(resumed: Path, expected: Path) -> None:
    """Compare the losses since the resume, and the students, with those of the uninterrupted run."""
    assert losses(resumed) == pytest.approx(losses(expected)[SAVED:], rel=NEAR)
    one, other = load_file(resumed / "student.safetensors"), load_file(expected / "student.safetensors")
    for name, tensor in other.items():
        if name.endswith("qkv.bias"):  # see test_same_curve.py
            continue
        torch.testing.assert_close(one[name], tensor, rtol=NEAR, atol=NEAR * tensor.abs().max().item())
