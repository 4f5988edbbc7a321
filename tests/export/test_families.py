"""Students of DINOv2's and DINOv3's kind in transformers and ONNX, by those libraries alone."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.config.networks import ModelConfig
from dmae_ds.export.export import LIMIT, export
from dmae_ds.export.source import open_source
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.initial import fill_student
from dmae_ds.weights.named import open_weights
from tests.export.conftest import STUDENT, disturb, make_run
from tests.export.test_export import expect, read_alone
from tests.messages import refused
from tests.teacher.layouts import dinov2_registers, dinov3
from tests.teacher.reference import SHAPE

# {timm's name: transformers' class}
CLASSES = {
    "vit_small_patch16_dinov3": "DINOv3ViTModel",
    "vit_small_patch16_dinov3_qkvb": "DINOv3ViTModel",
    "vit_small_plus_patch16_dinov3": "DINOv3ViTModel",
    "vit_small_patch14_reg4_dinov2": "Dinov2WithRegistersModel",
    "vit_small_patch14_dinov2": "Dinov2Model",
}


def student_of(name: str) -> dict:
    return {**STUDENT, "name": name, "mlp_ratio": 4}


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_is_of_transformers_class_and_reads_back(tmp_path, name):
    """`export` itself compares the outputs of both libraries."""
    run = make_run(tmp_path / "run", student=student_of(name))
    out, card = export(run, to="hf")
    config = json.loads((out / "config.json").read_text())
    assert card["check"]["largest"] <= LIMIT and config["architectures"] == [CLASSES[name]]
    assert f"import AutoImageProcessor, {CLASSES[name]}\n" in (out / "README.md").read_text()
    numbers = {key: value for key, value in student_of(name).items() if key != "name"}
    student = build_student(name, numbers, generator=torch.Generator())
    fill_student(student, str(out), ModelConfig(name=name, **numbers))
    expected = open_source(run, "encoder").tensors
    assert all(torch.equal(tensor, expected[key]) for key, tensor in student.state_dict().items())


@pytest.mark.slow
def test_transformers_alone_gives_the_students_tokens(tmp_path):
    arguments = []
    for name in CLASSES:
        run = make_run(tmp_path / name, student=student_of(name))
        arguments += [export(run, to="hf")[0], expect(run, "encoder", tmp_path / f"{name}.npz")]
    disturb(arguments[0] / "model.safetensors", "layer.1.attention.k_proj.weight")
    differences = read_alone("transformers", *arguments, cwd=tmp_path)
    assert differences[0] > 100 * LIMIT and all(difference < LIMIT for difference in differences[1:])


@pytest.mark.slow
def test_onnx_runs_a_rotary_student_and_pools_its_patches_alone(tmp_path):
    run = make_run(tmp_path / "run", student=student_of("vit_small_patch16_dinov3"))
    out, card = export(run, to="onnx")
    assert card["check"]["largest"] <= LIMIT
    assert "tokens[:, 5:].mean(axis=1)" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("eva02_tiny_patch14_224", {}, ["q_bias", "--to timm, safetensors or onnx"]),
        ("vit_small_patch14_reg4_dinov2", {"mlp_ratio": 2.5}, ["Dinov2WithRegistersModel", "2.5"]),
        ("vit_small_patch16_dinov3", {"what": "mae"}, ["gamma_1"]),
    ],
)
def test_a_student_that_transformers_lacks_is_refused(tmp_path, name, changes, words):
    what = changes.pop("what", "encoder")
    run = make_run(tmp_path / "run", student={**student_of(name), **changes})
    with refused(*words):
        export(run, to="hf", what=what)
    assert not list((run / "export").iterdir())
    assert load_file(run / "student.safetensors")


@pytest.mark.parametrize(
    "layout", [dinov2_registers, dinov3, partial(dinov3, "vit_small_patch16_dinov3_qkvb")]
)
def test_a_student_goes_back_under_the_names_that_it_began_with(tmp_path, layout):
    """Every tensor that the student has is the trained one, and the rest of the file as it was."""
    reference = layout()
    published = reference.save(tmp_path, reference.tensors)
    student = {"name": reference.name, **SHAPE, "weights": str(published)}
    run = make_run(tmp_path / "run", student=student)
    out, card = export(run, to="original")
    assert card["check"]["largest"] <= LIMIT
    written = torch.load(out / "model.pth", weights_only=True)
    shapes = {key: tensor.shape for key, tensor in reference.tensors.items()}
    assert {key: tensor.shape for key, tensor in written.items()} == shapes
    assert torch.equal(written["mask_token"], reference.tensors["mask_token"])
    expected, read = open_source(run, "encoder").tensors, open_weights(out / "model.pth", reference.format)
    assert all(torch.allclose(read[key], tensor, atol=1e-6) for key, tensor in expected.items())
    changed = [key for key in written if not torch.equal(written[key], reference.tensors[key])]
    assert len(changed) >= 0.9 * len(expected)  # in each block two of timm's biases are one of the file's


@pytest.mark.parametrize("to_timm", [False, True])
def test_a_student_without_such_a_file_is_told_what_fits(tmp_path, to_timm):
    first = make_run(tmp_path / "first")
    weights = {"weights": str(first / "student.safetensors")} if to_timm else {}
    run = make_run(tmp_path / "run", student={**STUDENT, **weights})
    with refused("safetensors", "student.weights"):
        export(run, to="original")
    assert not (run / "export" / "original").exists()
