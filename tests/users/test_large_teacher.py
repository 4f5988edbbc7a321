"""A group with a teacher of billions: a plan, slices, stages over ranks; the run itself with a small one."""

from __future__ import annotations

import pytest

from tests.train.conftest import free_port, losses
from tests.users.conftest import SMALL, TEACHER, save_teacher

pytestmark = pytest.mark.slow
SEVEN_B = (
    "dmae_vit_large_to_base precision=bf16_autocast teacher.name=vit_7b_patch16_dinov3 teacher.img_size=224"
)


def test_a_teacher_in_stages(shell, digits):
    folder = shell.folder
    # A DINOv3 has never seen masks: the plan warns of `visible`, and finds a placement for 24 GB.
    visible = shell(f"dmae-ds plan {SEVEN_B} --gpus 16 --gpu l40s")
    assert "teacher.sees" in visible
    everything = shell(f"dmae-ds plan {SEVEN_B} teacher.sees=all --gpus 16 --gpu l40s")
    assert "pipeline P=" in everything and "WARNING" not in everything.upper().replace("TEACHER.SEES=ALL", "")
    assert "GB of a file" in everything  # what loading it takes

    save_teacher(folder / "teacher.safetensors")
    shell(
        "dmae-ds teacher inspect teacher.safetensors --write",
        "--name",
        "vit_tiny_patch16_224",
        *(word.removeprefix("teacher.") for word in ["img_size=32", "patch_size=4", *TEACHER]),
    )
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    recipe = [
        "digits_dmae",
        "teacher.weights=teacher.safetensors",
        "teacher.format=timm",
        *TEACHER,
        *data,
        *SMALL,
    ]
    curves = {}
    for name, placed in {
        "replicated": ["teacher.placement=replicated"],
        "pipeline": ["teacher.placement=pipeline", "teacher.stages=2"],
        "zero3": ["teacher.placement=zero3"],
    }.items():
        launcher = f"deepspeed -q --num_gpus 2 --master_port {free_port()} --module dmae_ds"
        shell(f"{launcher} train", *recipe, f"run.dir=runs/{name}", *placed)
        curves[name] = losses(folder / "runs" / name)
    assert curves["replicated"] == curves["pipeline"] == curves["zero3"] and len(curves["zero3"]) > 10
    refused = shell(
        "dmae-ds train", *recipe, "run.dir=runs/one", "teacher.placement=pipeline", "teacher.stages=2", code=2
    )
    assert "teacher.stages" in refused
