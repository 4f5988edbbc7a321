"""Students with registers, layer scale, rotary or learned positions: the same losses under every ZeRO stage.

Also after a kill. Their networks are compared with timm's in tests/models/test_students.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import read_saved_config
from tests.train.conftest import command, deepspeed, losses, run
from tests.train.test_resume import kill_at_step

DRIVER = Path(__file__).with_name("driver.py")
pytestmark = pytest.mark.slow
STUDENTS = {
    "dinov3": "vit_small_patch16_dinov3_qkvb",  # rotary, registers, layer scale, EVA's key bias
    "dinov2": "vit_small_patch14_reg4_dinov2",  # learned positions, registers, layer scale
    "eva02": "eva02_tiny_patch14_224",  # both kinds of positions, gated MLP, no final norm
    "siglip": "vit_base_patch16_siglip_224",  # no CLS, an attention pool that is kept
}
TWO_RANKS = {
    "zero1": ["deepspeed=zero1"],
    "zero2": ["deepspeed=zero2", "optim.micro_batch=4"],
    "zero3": ["deepspeed=zero3"],
    "zero3_checkpointed": ["deepspeed=zero3", "student.checkpoint_blocks=true"],
    "zero2_bf16": ["deepspeed=zero2", "precision=bf16"],
    "zero3_bf16": ["deepspeed=zero3", "precision=bf16"],
}


NUMBERS = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> list[str]:
    """`tiny_recipe` whose student may be of any family."""
    return [*tiny_recipe, "log.every_steps=1"]


@pytest.fixture(scope="module")
def curves(recipe, tmp_path_factory) -> Path:
    """A folder with runs named <student>-<variant>: one start alone, one with two ranks."""
    folder = tmp_path_factory.mktemp("curves")
    for start, variants in (
        ([sys.executable, DRIVER], {"alone": ["deepspeed=zero0"]}),
        ([*deepspeed(2), DRIVER], TWO_RANKS),
    ):
        runs = [
            [*recipe, f"run.dir={folder / f'{student}-{variant}'}", f"student.name={name}", *extra]
            for student, name in STUDENTS.items()
            for variant, extra in variants.items()
        ]
        done = run([*map(str, start), json.dumps(runs)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("variant", TWO_RANKS)
@pytest.mark.parametrize("student", STUDENTS)
def test_two_ranks_compute_what_one_process_does(curves, student, variant):
    alone, found = losses(curves / f"{student}-alone"), losses(curves / f"{student}-{variant}")
    assert len(alone) == 20 and alone[-1] < alone[0]
    assert found == pytest.approx(alone, rel=5e-2 if "bf16" in variant else 1e-5)


@pytest.mark.parametrize("variant", ["alone", "zero3", "zero3_bf16"])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_file_loads_into_timm_and_what_no_objective_trains_is_as_drawn(curves, student, variant):
    config = read_saved_config(curves / f"{student}-{variant}")
    state = load_file(curves / f"{student}-{variant}" / "student.safetensors")
    model = timm.create_model(config.student.name, num_classes=0, **config.student.overrides())
    model.load_state_dict(state, strict=True)
    assert all(tensor.isfinite().all() for tensor in state.values())
    scales = [tensor for name, tensor in state.items() if "gamma" in name]
    assert all(not torch.allclose(scale, torch.full_like(scale, 1e-5)) for scale in scales)
    first = load_file(curves / f"{student}-zero1" / "student.safetensors")
    above = [name for name in state if name.startswith(("attn_pool.", "fc_norm."))]
    assert bool(above) == (student in ("eva02", "siglip"))
    assert all(torch.equal(state[name], first[name]) for name in above)


@pytest.mark.parametrize("ranks, stage", [(1, "zero1"), (2, "zero3")])
def test_what_is_not_trained_comes_from_the_checkpoint_of_a_resumed_run(recipe, tmp_path, ranks, stage):
    """An attention pool, read from student.weights at the start, also resharded and in an EMA teacher."""
    model = timm.create_model(STUDENTS["siglip"], num_classes=0, **NUMBERS)
    save_file(model.state_dict(), tmp_path / "file.safetensors")
    own = ["objective.name=sdae", f"student.name={STUDENTS['siglip']}", "checkpoint.every_steps=5"]
    own += [f"student.weights={tmp_path / 'file.safetensors'}", f"run.dir={tmp_path / 'run'}", "teacher=null"]
    for epochs, words in ((10, ["deepspeed=zero1"]), (20, [f"deepspeed={stage}", "--resume", "auto"])):
        words = ["train", *recipe, *own, f"optim.epochs={epochs * 16 / 1400}", *words]
        words = [word for word in words if not word.startswith("teacher.")]
        done = run(command(words, ranks=1 if epochs == 10 else ranks), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    student = load_file(tmp_path / "run" / "student.safetensors")
    above = [name for name in student if name.startswith("attn_pool.")]
    assert len(above) > 5 and not torch.equal(student["norm.weight"], model.norm.weight)
    assert all(torch.equal(student[name], model.state_dict()[name]) for name in above)


def test_killed_and_resumed_is_bit_identical(recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    recipe = [*recipe, f"student.name={STUDENTS['dinov3']}", "deepspeed=zero3", "checkpoint.every_steps=5"]
    for run_dir in (whole, killed):
        if run_dir is killed:
            kill_at_step(recipe, killed, 12, ranks=2, more=[])
            resumed_from = int((killed / "checkpoints" / "latest").read_text().removeprefix("step-"))
            assert 5 <= resumed_from < 20
        done = run(
            command(["train", *recipe, f"run.dir={run_dir}", "--resume", "auto"], ranks=2), cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(killed) == losses(whole)
    expected, found = (load_file(run_dir / "student.safetensors") for run_dir in (whole, killed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in found)
