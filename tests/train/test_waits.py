"""The host never waits for the device within a step: on a GPU, each wait leaves it idle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.train.conftest import free_port, run

DRIVER = str(Path(__file__).with_name("waits_driver.py"))
STEPS = 20


@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_steps_read_nothing_off_the_device_besides_the_logged_ones(ranks, tiny_recipe, tmp_path):
    recipe, *overrides = tiny_recipe
    common = [*overrides, "log.every_steps=10", "checkpoint.every_minutes=null", "checkpoint.every_steps=1000"]
    # overlap_comm waits once a bucket, by DeepSpeed's design; one rank alone is spared it
    alike = [["deepspeed=zero0"], ["deepspeed=zero1"], ["deepspeed=zero2"], ["deepspeed=zero2", "precision=bf16"], ["deepspeed=zero0", "precision=bf16_autocast"]]
    if ranks == 2:
        alike = [["deepspeed=zero0"], [f"deepspeed={_without_overlap(tmp_path)}"]]
    controls = [[*alike[-1 if ranks == 2 else 2], "optim.clip_grad=1.0"]]
    recipes = [[recipe, *common, f"run.dir={tmp_path / str(number)}", *more] for number, more in enumerate(alike + controls)]
    arguments = [DRIVER, json.dumps(recipes)]
    launcher = [sys.executable] if ranks == 1 else ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port())]
    done = run([*launcher, *arguments], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    found = [json.loads(line.split("FOUND ")[1]) for line in done.stdout.splitlines() if "FOUND " in line]
    assert len(found) == len(recipes)
    for more, counts in zip(alike, found):
        assert counts.pop("allowed", 0) >= 1, more  # flushes do read
        assert counts == {}, more
    assert sum(found[-1].values()) - found[-1]["allowed"] >= STEPS  # clipping reads the norm: the counting sees it
    steps = [json.loads(line)["step"] for line in (tmp_path / "0" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) >= STEPS


def _without_overlap(folder: Path) -> Path:
    path = folder / "no_overlap.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True}}))
    return path
