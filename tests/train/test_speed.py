"""Speed in every line of a run's metrics: TFLOP/s, and the share of the fastest matrix product."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from packaging.version import parse
from safetensors.torch import load_file

from dmae_ds.config.load import load_config
from dmae_ds.models import onednn
from dmae_ds.plan.work import step_work
from dmae_ds.train import speed as speed_module
from dmae_ds.train.speed import Speed, Yardstick, product_kernels
from tests.train.conftest import command, run


def test_the_share_is_the_shortest_possible_time_over_the_time():
    speed = Speed(
        {"teacher": (40, torch.bfloat16), "forward": (10, torch.float32)},
        {torch.bfloat16: 20.0, torch.float32: 5.0},
    )
    assert speed.flops == 50 and speed.floor_s == 40 / 20 + 10 / 5
    assert speed.at(8.0) == {"tflops": 50 / 8e12, "of_peak": 0.5}


def test_the_yardstick_is_the_fastest_product_so_far_by_any_kernel(monkeypatch):
    clock, seconds = [0.0], {"slow": 4.0, "fast": 2.0}
    kernels = {name: lambda *_, name=name: clock.append(clock[-1] + seconds[name]) for name in seconds}
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: clock[-1])
    monkeypatch.setattr(speed_module, "product_kernels", lambda *_: kernels)
    monkeypatch.setitem(speed_module.SHAPES, "cpu", ((2, 3, 4), (8, 8, 8)))
    yardstick = Yardstick(torch.float32, torch.device("cpu"))
    assert yardstick.measure() == 2 * 8**3 / 2.0 and yardstick.kernel == "fast 8 x 8 x 8"
    seconds["fast"] = 9.0
    assert yardstick.measure() == 2 * 8**3 / 2.0  # a slower round changes nothing
    seconds["slow"] = 1.0
    assert yardstick.measure() == 2 * 8**3 / 1.0 and yardstick.kernel == "slow 8 x 8 x 8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_kernel_of_a_step_is_measured_and_multiplies(dtype):
    kernels = product_kernels(dtype, torch.device("cpu"))
    assert (onednn.product in kernels.values()) == (dtype == torch.float32 and onednn.onednn_operator())
    left, right = (torch.randn(rows, 32).to(dtype) for rows in (16, 48))
    expected = left.float() @ right.float().t()
    for name, multiply in kernels.items():
        if dtype == torch.float8_e4m3fn and parse(torch.__version__) < parse("2.14"):
            continue  # on GPUs alone
        torch.testing.assert_close(multiply(left, right).float(), expected, msg=name, rtol=0.02, atol=0.1)


def test_a_teacher_in_float8_is_compared_with_products_in_float8():
    config = load_config("dmae_vit_large_to_base", ["teacher.weights=x", "teacher.dtype=fp8"])
    part = SimpleNamespace(flops=8, forward_flops=8, backward_flops=8)
    geometry = SimpleNamespace(student=part, teachers={"": part}, ema=None)
    assert step_work(config, geometry, 2)["teacher"] == (16, torch.float8_e4m3fn)


def test_a_run_of_a_large_network_shows_its_speed(tiny_recipe, tmp_path):
    recipe, *overrides = tiny_recipe
    few = [*overrides, "optim.epochs=0.06", "optim.warmup_epochs=0.01", "log.every_steps=2"]
    large = ["student.embed_dim=384", "student.num_heads=6", f"run.dir={tmp_path / 'large'}"]
    began = time.perf_counter()
    done = run(command(["train", recipe, *few, *large], ranks=1), cwd=tmp_path)
    whole_s = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["of_peak"] > 0 and line["tflops"] > 0 for line in lines)
    batch = load_config(str(tmp_path / "large" / "config.yaml")).optim.global_batch
    assert (
        0 < sum(batch / line["images_per_s"] for line in lines) < whole_s
    )  # steps are a part of the command
    last = [line for line in done.stderr.splitlines() if " of peak" in line][-1]
    assert all(f" {name} " in last for name in ("epoch", "loss", "lr", "img/s", "data", "memory")), last
    assert "saved step-" in done.stderr and "done: " in done.stderr.splitlines()[-1]
    check_log(tmp_path / "large", done.stderr)
    # work of a step / time of a step
    assert lines[-1]["tflops"] * 1e12 / lines[-1]["images_per_s"] == pytest.approx(
        lines[0]["tflops"] * 1e12 / lines[0]["images_per_s"]
    )


def check_log(run_dir, printed):
    """The run's own log has the lines that were printed, and its last ones load the student."""
    command_line, *kept = (run_dir / "train.log").read_text().splitlines()
    assert "train digits_dmae" in command_line
    assert kept == [line for line in printed.splitlines() if line in kept] and len(kept) > 10
    start = kept.index("import safetensors.torch, timm")
    scope = {"pixels": torch.randn(2, 3, 32, 32)}
    exec("\n".join(kept[start:-1]), scope)
    assert scope["features"].shape == (2, 384) and not scope["model"].training
    weights = load_file(run_dir / "student.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in scope["model"].state_dict().items())
    tokens = scope["model"].forward_features(scope["pixels"])
    torch.testing.assert_close(scope["features"], tokens[:, 1:].mean(dim=1))
