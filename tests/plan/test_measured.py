"""Predicted memory against the measured resident set of real runs: two ranks, fp32, on a CPU.

Measured / predicted - 1 when this was written (torch 2.14, DeepSpeed 0.19.8, glibc 2.36): +8% (ZeRO-2,
replicated), +8% (ZeRO-3, pipeline), +4% (ZeRO-1, pipeline, two micro-batches a step). The rest is glibc's
fragmentation, which is not modelled; without ZeRO, where gradients and moments are small tensors too, it was
11%.
"""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.models.vit import build_student
from tests.train.conftest import command, run

RECIPE = """
run: {dir: run}
student: {name: vit_base_patch16_224, img_size: 96}
teacher: {name: vit_base_patch16_224, img_size: 96, weights: teacher.safetensors}
objective: {name: dmae}
data: {train: nowhere, num_workers: 1}
optim: {global_batch: 64, micro_batch: 32, epochs: 0.137, warmup_epochs: 0.01}
checkpoint: {every_minutes: null}
log: {trackers: []}
"""
PIPELINE = ["teacher.placement=pipeline", "teacher.stages=2"]


@pytest.fixture(scope="module")
def recipe(digits, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("measured")
    save_file(
        build_student(
            "vit_base_patch16_224", {"img_size": 96}, generator=torch.Generator().manual_seed(7)
        ).state_dict(),
        folder / "teacher.safetensors",
    )
    (folder / "recipe.yaml").write_text(RECIPE)
    return [
        str(folder / "recipe.yaml"),
        f"data.train={digits / 'train'}",
        f"teacher.weights={folder / 'teacher.safetensors'}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["deepspeed=zero2"],
        ["deepspeed=zero3", *PIPELINE],
        ["deepspeed=zero1", "optim.micro_batch=16", *PIPELINE],
    ],
    ids=" ".join,
)
def test_predicted_and_measured_memory_are_within_a_tenth(recipe, tmp_path, more):
    done = run(command(["train", *recipe, f"run.dir={tmp_path / 'run'}", *more], ranks=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"memory +([\d.]+) GiB a rank predicted .*?, ([\d.]+) measured", done.stderr)
    predicted, measured = map(float, line)
    assert predicted > 2 and abs(measured / predicted - 1) < 0.1
