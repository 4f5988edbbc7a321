"""Checks of a teacher's identity: the inspected weights, live features, signs of training."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.vit import build_student
from dmae_ds.teacher import identity
from dmae_ds.teacher.build import build_frozen_teacher
from dmae_ds.tools.teacher_inspect import inspect
from tests.messages import refused

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
MEAN = STD = (0.5, 0.5, 0.5)


def trained_like(seed=0):
    """Random weights like trained ones: gains and biases are not initial values, and features grow."""
    torch.manual_seed(seed)
    state = timm.create_model(NAME, num_classes=0, **TINY).state_dict()
    return {
        name: tensor * (6 if tensor.ndim == 2 else 1) + 0.1 * torch.randn_like(tensor)
        for name, tensor in state.items()
    }


def build(path, *, taps=("block/3",), dtype="fp32", **options):
    config = TeacherConfig(name=NAME, weights=str(path), dtype=dtype, **{**TINY, **options})
    return build_frozen_teacher(
        config, taps=taps, whole_blocks=4, mean=MEAN, std=STD, device=torch.device("cpu")
    )


@pytest.fixture
def file(tmp_path):
    save_file(trained_like(), tmp_path / "teacher.safetensors")
    return tmp_path / "teacher.safetensors"


def write_fingerprint(file):
    return inspect(file, name=NAME, overrides=[f"{key}={value}" for key, value in TINY.items()], write=True)


def test_a_fingerprint_written_by_inspect_is_found_and_matches(file):
    assert "written to" in write_fingerprint(file)
    assert set(json.loads(identity.sidecar(file).read_text())["fingerprint"]) == {
        f"block/{number}" for number in (1, 2, 3, 4)
    }
    for options in ({}, {"dtype": "bf16"}, {"taps": ("block/1", "block/4")}, {"img_size": 48}):
        assert any("match the fingerprint" in note for note in build(file, **options).parts.notes), options


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(trained_like(seed=1)),
        lambda t: t.update(
            # A square matrix: its shape is the same.
            {"blocks.2.attn.proj.weight": t["blocks.2.attn.proj.weight"].T.contiguous()}
        ),
        lambda t: t.update({"patch_embed.proj.weight": t["patch_embed.proj.weight"].flip(1)}),  # BGR
    ],
    ids=["other weights", "one matrix transposed", "channels reversed"],
)
def test_weights_of_another_fingerprint_are_refused(file, change, dtype):
    write_fingerprint(file)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with refused("fingerprint", identity.sidecar(file)):
        build(file, dtype=dtype)


def test_a_broken_fingerprint_file_is_refused(file):
    identity.sidecar(file).write_text("{")
    with refused(identity.sidecar(file), "inspect --write"):
        build(file)


def test_features_that_are_not_finite_are_refused(file):
    tensors = load_file(file)
    tensors["blocks.1.mlp.fc2.bias"][3] = float("nan")
    save_file(tensors, file)
    with refused("block/", "not finite"):
        build(file)


def test_features_that_are_the_same_everywhere_are_refused(file):
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        | {"cls_token": torch.ones(1, 1, 32)},
        file,
    )
    with refused("block/", "every patch"):
        build(file)


def warned(teacher):
    return any("LOOKS UNTRAINED" in note for note in teacher.parts.notes)


def test_a_fresh_network_is_noticed_and_a_trained_one_is_not(file, tmp_path):
    assert not warned(build(file))
    save_file(timm.create_model(NAME, num_classes=0, **TINY).state_dict(), tmp_path / "timm.safetensors")
    assert warned(build(tmp_path / "timm.safetensors"))
    save_file(
        build_student(NAME, TINY, generator=torch.Generator().manual_seed(5)).state_dict(),
        tmp_path / "mae.safetensors",
    )
    assert warned(build(tmp_path / "mae.safetensors"))


def test_a_fresh_network_of_an_unknown_initialisation_is_noticed_by_its_gains_and_biases(tmp_path):
    """Its matrices are large, so its features grow like a trained network's."""
    state = timm.create_model(NAME, num_classes=0, **TINY).state_dict()
    state = {name: tensor * (6 if tensor.ndim == 2 else 1) for name, tensor in state.items()}
    save_file(state, tmp_path / "t.safetensors")
    notes = build(tmp_path / "t.safetensors").parts.notes
    assert any("UNTRAINED" in note and "gain" in note and "bias" in note for note in notes)


@pytest.mark.parametrize("fresh", ["timm", "mae"])
def test_a_fresh_network_is_noticed_by_its_features_alone(tmp_path, fresh):
    """Its gains and biases are not those of any initialisation."""
    torch.manual_seed(2)
    if fresh == "timm":
        state = timm.create_model(NAME, num_classes=0, **TINY).state_dict()
    else:
        state = build_student(NAME, TINY, generator=torch.Generator().manual_seed(5)).state_dict()
    state = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in state.items()}
    save_file(state, tmp_path / "t.safetensors")
    notes = build(tmp_path / "t.safetensors").parts.notes
    assert any("UNTRAINED" in note and "features" in note for note in notes)
