"""Speed in every line of a run's metrics: TFLOP/s, and the share of the fastest matrix product."""

from __future__ import annotations

import json

import pytest
import torch

from dmae_ds.train.speed import Speed, gemm_rate
from tests.train.conftest import command, run


def test_the_share_is_the_shortest_possible_time_over_the_time():
    speed = Speed(
        {"teacher": (40, torch.bfloat16), "forward": (10, torch.float32)},
        {torch.bfloat16: 20.0, torch.float32: 5.0},
    )
    assert speed.flops == 50 and speed.floor_s == 40 / 20 + 10 / 5
    assert speed.at(8.0) == {"tflops": 50 / 8e12, "of_peak": 0.5}


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    from dmae_ds.train import speed

    times = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    monkeypatch.setitem(speed.SIZES, "cpu", 8)
    assert gemm_rate(torch.float32, torch.device("cpu"))() == 2 * 8**3 / 1.0


def test_a_run_of_a_large_network_shows_its_speed(tiny_recipe, tmp_path):
    recipe, *overrides = tiny_recipe
    few = [*overrides, "optim.epochs=0.06", "optim.warmup_epochs=0.01", "log.every_steps=2"]
    large = ["student.embed_dim=384", "student.num_heads=6", f"run.dir={tmp_path / 'large'}"]
    done = run(command(["train", recipe, *few, *large], ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["of_peak"] > 0 and line["tflops"] > 0 for line in lines)
    assert "of peak" in done.stderr and "data " in done.stderr
    # work of a step / time of a step
    assert lines[-1]["tflops"] * 1e12 / lines[-1]["images_per_s"] == pytest.approx(
        lines[0]["tflops"] * 1e12 / lines[0]["images_per_s"]
    )
