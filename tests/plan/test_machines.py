"""The machine that `dmae-ds plan` plans for: GPUs by name, measured rates, and published runs as a bound."""

from __future__ import annotations

import json
import re

import pytest

from dmae_ds.cli.main import main
from dmae_ds.config.load import load_config
from dmae_ds.plan.choose import candidates
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import measure
from dmae_ds.plan.gpus import GPUS, gpu_called
from dmae_ds.plan.measured import read_measured
from dmae_ds.plan.memory import Zero
from tests.messages import refused

VIT_L = ["student.name=vit_large_patch16_224", "precision=fp16"]
# Nearly all patches and a thin decoder: a little less work than the published network, which has all patches
# and labels.
VIT_G = [
    "student.name=vit_giant_patch14_224",
    "objective.mask_ratio=0.02",
    "objective.decoder.depth=1",
    "objective.decoder.embed_dim=128",
    "objective.decoder.num_heads=2",
    "precision=bf16_autocast",
    "optim.global_batch=512",
]
# (GPU, number, recipe, images/s of a GPU): MAE's repository (42 hours for 800 epochs), NeMo's page of ViT.
PUBLISHED = [
    ("v100", 64, VIT_L, 106),
    ("a6000", 8, ["precision=fp16", "optim.global_batch=512"], 313),
    pytest.param("h100", 8, VIT_G, 178, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("gpu, gpus, overrides, published", PUBLISHED)
def test_no_more_is_promised_than_published_runs_reached(gpu, gpus, overrides, published):
    config = load_config("mae_vit_base", overrides)
    named = gpu_called(gpu).machine()
    unnamed = {"memory_gib": 80.0, "tflops": named["tflops"]}
    geometry = measure(config, config.optim.global_batch // gpus, device_type="cuda")
    for numbers in (named, unnamed):
        machine = Machine(gpus=gpus, gpus_per_node=8, **numbers)
        rows = candidates(
            geometry, machine, {"zero1": Zero(1)}, precision=config.precision, accumulation=1, gpu=True
        )
        assert geometry.micro_batch / rows[0].cost.seconds <= 1.3 * published


def test_data_sheets_are_read_by_name_and_single_numbers_replaced(capsys):
    for name, gpu in GPUS.items():
        assert 0 < gpu.efficiency <= 0.3 and 20 < gpu.memory_gib < 200, name
        assert gpu.fp32_tflops <= gpu.tflops / 1.9 and gpu_called(name.upper()) is gpu
    arguments = ["plan", "digits_mae", "data.train=nowhere", "--gpus", "16", "--gpu", "h200"]
    assert main([*arguments, "--gpu-memory-gib", "10"]) == 0
    out = capsys.readouterr().out
    assert "of 10 GiB, 8 a node" in out and "989 TFLOP/s" in out


def bench_json(path, *, dtype="bf16", **replaced) -> str:
    """What `bench step --json` prints, of a step at a fifth of 500 TFLOP/s; the optimizer is not counted."""
    part = {"seconds": 0.5, "gflop": 50_000.0, "dtype": dtype, "of_peak": 0.2}
    parts = {"prepare": {"seconds": 1.0}, "forward": part, "backward": part, "optimizer": {"seconds": 1.0}}
    found = {
        "recipe": "vit_tiny",
        "device": "A device",
        "gemm_gflops": {dtype: 500_000.0},
        "steps": [{"parts": parts}],
    }
    path.write_text(json.dumps(found | replaced))
    return str(path)


def test_measured_rates_replace_the_guesses(tmp_path, capsys):
    file = bench_json(tmp_path / "step.json")
    measured = read_measured(tmp_path / "step.json")
    assert measured.efficiency == pytest.approx(0.2) and measured.tflops == 500
    recipe = ["plan", "digits_mae", "data.train=nowhere", "precision=bf16"]
    assert main([*recipe, "--measured", file]) == 0
    out = capsys.readouterr().out
    assert "A device" in out and "20% of 500 TFLOP/s" in out
    assert re.search(r"^at 20% of the peak rates: [\d.]+ s a step", out, re.MULTILINE)
    for more, words in (
        (["--efficiency", ".3"], ["--efficiency", "--measured"]),
        (["precision=fp32"], ["fp32", "--measured"]),
    ):
        assert main([*recipe, *more, "--measured", file]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    "replaced", [{"steps": []}, {"gemm_gflops": {"bf16": 0}}, {"device": None, "steps": 1}]
)
def test_a_file_of_something_else_is_refused(tmp_path, replaced):
    bench_json(tmp_path / "step.json", **replaced)
    with refused("step.json", "bench step"):
        read_measured(tmp_path / "step.json")
    (tmp_path / "step.json").write_text("not JSON")
    with refused("step.json", "bench step"):
        read_measured(tmp_path / "step.json")


@pytest.mark.parametrize(
    "overrides, family",
    [
        (["teacher.name=vit_7b_patch16_dinov3"], "DINO"),
        (["teacher.name=vit_base_patch16_clip_224"], "CLIP"),
        (["teacher.weights=google/siglip-base"], "SigLIP"),
        (["teacher.format=dinov2"], "DINO"),
        (["teacher.name=vit_7b_patch16_dinov3", "teacher.sees=all"], None),
        (["teacher.weights=clips/mae.pth"], None),
    ],
)
def test_a_teacher_of_whole_images_that_sees_few_patches_is_warned_about(overrides, family):
    warning = load_config("dmae_vit_large_to_base", overrides).teacher_warning()
    assert (warning is None) == (family is None)
    if family:
        assert f" {family} " in warning and "teacher.sees=all" in warning


def test_plan_prints_the_warning(capsys):
    recipe = ["digits_dmae", "data.train=nowhere", "teacher.weights=nowhere", "teacher.format=dinov2"]
    for sees in ("visible", "all"):
        assert main(["plan", *recipe, f"teacher.sees={sees}", "--gpus", "1"]) == 0
        assert ("WARNING" in capsys.readouterr().out) == (sees == "visible")
