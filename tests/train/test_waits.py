"""The host never waits for the device within a step: on a GPU, each wait leaves it idle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from dmae_ds.data.batch import Batch
from dmae_ds.train.inputs import copied
from tests.train.conftest import deepspeed, run

DRIVER = str(Path(__file__).with_name("waits_driver.py"))
STEPS = 20


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_only_logged_steps_read_values_off_the_device(ranks, tiny_recipe, tmp_path):
    recipe, *overrides = tiny_recipe
    common = [
        *overrides,
        "log.every_steps=10",
        "checkpoint.every_minutes=null",
        "checkpoint.every_steps=1000",
    ]
    # With several ranks overlap_comm waits once a bucket, by DeepSpeed's design.
    alike = [
        ["deepspeed=zero0"],
        ["deepspeed=zero1"],
        ["deepspeed=zero2"],
        ["deepspeed=zero2", "precision=bf16"],
        ["deepspeed=zero0", "precision=bf16_autocast"],
    ]
    if ranks == 2:
        alike = [["deepspeed=zero0"], [f"deepspeed={_without_overlap(tmp_path)}"]]
    controls = [[*alike[-1 if ranks == 2 else 2], "optim.clip_grad=1.0"]]
    recipes = [
        [recipe, *common, f"run.dir={tmp_path / str(number)}", *more]
        for number, more in enumerate(alike + controls)
    ]
    arguments = [DRIVER, json.dumps(recipes)]
    launcher = [sys.executable] if ranks == 1 else deepspeed(2)
    done = run([*launcher, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found = [json.loads(line.split("FOUND ")[1]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(found) == len(recipes)
    for more, counts in zip(alike, found, strict=False):  # the last one is the control
        assert counts.pop("allowed", 0) >= 1, more  # flushes do read
        assert counts == {}, more
    assert sum(found[-1].values()) - found[-1]["allowed"] >= STEPS  # clipping reads the norm
    steps = [json.loads(line)["step"] for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) >= STEPS


def _without_overlap(folder: Path) -> Path:
    path = folder / "no_overlap.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True}})
    )
    return path


@pytest.mark.gpu
def test_batches_copied_on_a_stream_of_their_own_arrive_complete():
    device = torch.device("cuda")
    sent = [
        Batch(
            images=torch.full((64, 3, 64, 64), number, dtype=torch.uint8),
            noise=torch.full((64, 16), number / 100),
            labels=torch.full((64,), number),
            sample_ids=torch.arange(64),
            epochs=torch.zeros(64, dtype=torch.int64),
        ).pin_memory()
        for number in range(40)
    ]
    busy, arrived = torch.randn(2048, 2048, device=device), []
    for batch in copied(sent, device):
        for _ in range(20):  # the device lags behind while memory is freed and reused
            busy = (busy @ busy).clamp(-1, 1)
        arrived.append((batch.images.float().mean(), batch.noise.mean(), batch.labels.float().mean()))
    for number, (images, noise, labels) in enumerate(arrived):
        assert (images.item(), labels.item()) == (number, number) and noise.item() == pytest.approx(
            number / 100
        )
