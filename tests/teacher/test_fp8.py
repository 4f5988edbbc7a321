"""Float8 teachers are refused where they can't run; elsewhere they report how features change."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dmae_ds.config.load import load_config
from dmae_ds.models.vit import build_student
from dmae_ds.teacher import fp8
from dmae_ds.teacher.frozen import FrozenTeacher
from tests.messages import refused

TEACHER = ["teacher.weights=x.pth", "teacher.dtype=fp8", "data.train=t"]


def test_fp8_without_a_gpu_is_refused():
    with refused("teacher.dtype fp8", "GPU", "teacher.dtype=bf16"):
        fp8.check_fp8(torch.device("cpu"))


@pytest.mark.parametrize(
    "capability, spec, words",
    [
        ((8, 0), object(), ["A100", "8.0", "8.9"]),
        ((9, 0), None, ["torchao", "pip install"]),
        ((8, 9), object(), None),
    ],
)
def test_the_hardware_and_torchao_are_checked(capability, spec, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    if words is None:
        fp8.check_fp8(torch.device("cuda"))
    else:
        with refused("teacher.dtype", *words):
            fp8.check_fp8(torch.device("cuda"))


def test_other_placements_are_refused():
    with refused("teacher.dtype fp8", "teacher.placement", "replicated", "pipeline"):
        load_config("dmae_vit_large_to_base", [*TEACHER, "teacher.placement=pipeline", "teacher.stages=2"])
    assert load_config("dmae_vit_large_to_base", TEACHER).teacher.dtype == "fp8"


def test_the_features_error_is_measured_on_the_fixed_input():
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    vit = build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(0))
    teacher = FrozenTeacher(vit, ("block/2", "block/4"), None)
    before = teacher.probe().features

    def halve(blocks):
        for block in blocks:
            block.mlp.fc2.weight.data.mul_(0.5)

    text = fp8.to_fp8(teacher, halve)
    after = teacher.probe().features
    errors = [((after[number] - before[number]).norm() / before[number].norm()).item() for number in (2, 4)]
    assert f"{errors[0]:.2%} at block 2, {errors[1]:.2%} at block 4" in text
    assert min(errors) > 0.001


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_a_float8_teacher_runs_and_is_near_the_bf16_one():
    device = torch.device("cuda")
    fp8.check_fp8(device)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 4}
    vit = build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(0)).to(
        device, torch.bfloat16
    )
    text = fp8.to_fp8(FrozenTeacher(vit, ("block/2",), None))
    assert 0 < float(text.rsplit(" by ", 1)[1].split("%")[0]) < 20
