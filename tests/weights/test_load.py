"""Messages about a weights file name the keys of its reader and the user's own path, unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.config.evaluation import DistillConfig
from dmae_ds.config.networks import ModelConfig, TeacherConfig
from dmae_ds.finetune.network import build_classifier, classifier_kwargs, fill_trunk, load_teacher
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.initial import fill_student
from dmae_ds.teacher.build import load_frozen_teacher
from tests.messages import refused

NAME = "vit_tiny_patch16_224"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NETWORK = ModelConfig(name=NAME, **SHAPE)
PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def student():
    return build_student(NAME, SHAPE, generator=torch.Generator().manual_seed(0))


def read_student(path: Path) -> None:
    fill_student(student(), str(path), NETWORK)


def read_teacher(path: Path) -> None:
    config = TeacherConfig(name=NAME, **SHAPE, weights=str(path), format="auto")
    load_frozen_teacher(config, taps=("block/2",), whole_blocks=2, device=torch.device("cpu"), **PIXELS)


def read_trunk(path: Path) -> None:
    model = build_classifier(NETWORK, classifier_kwargs("cls", 3), seed=0, **PIXELS)
    fill_trunk(model, path, "auto", NETWORK)


def read_distilling_classifier(path: Path) -> None:
    config = DistillConfig(method="features", teacher=str(path), name=NAME)
    load_teacher(config, num_classes=3, img_size=224, **PIXELS)


# reader: (the key that names the file, keys of other readers)
READERS = {
    read_student: ("student.weights '", ["teacher.", "distill."]),
    read_teacher: ("teacher.weights '", ["student.", "distill."]),
    read_trunk: ("weights '", ["teacher.", "student.", "distill."]),
    read_distilling_classifier: ("distill.teacher '", ["teacher.weights", "teacher.format", "student."]),
}


def missing(path: Path) -> None:
    pass


def damaged(path: Path) -> None:
    torch.save({"model": student().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-100])


def without_weights(path: Path) -> None:
    torch.save({"epoch": 3, "weights": {}}, path)


def of_another_format(path: Path) -> None:
    torch.save({f"net_{name}": tensor for name, tensor in student().state_dict().items()}, path)


def of_another_size(path: Path) -> None:
    wide = build_student(NAME, {**SHAPE, "embed_dim": 48}, generator=torch.Generator().manual_seed(0))
    torch.save({"model": wide.state_dict()}, path)


def with_a_missing_tensor(path: Path) -> None:
    torch.save({"model": {k: t for k, t in student().state_dict().items() if k != "cls_token"}}, path)


FAULTS = [missing, damaged, without_weights, of_another_format, of_another_size, with_a_missing_tensor]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("reader", READERS)
def test_a_fault_names_the_readers_key_and_the_path_as_it_is(tmp_path, reader, fault):
    path = tmp_path / "my-teacher.weights-and-student-files" / "teacher.format.pth"
    path.parent.mkdir()
    fault(path)
    key, foreign = READERS[reader]
    with refused(key, path) as error:
        reader(path)
    words = str(error.value).replace(str(path), "").replace(path.name, "")
    assert not [word for word in foreign if word in words], words


@pytest.mark.parametrize("reader", [read_student, read_trunk])
def test_a_deeper_file_and_other_heads_are_refused_where_a_whole_network_is_read(tmp_path, reader):
    path = tmp_path / "teacher.safetensors"
    deeper = build_student(NAME, {**SHAPE, "depth": 3}, generator=torch.Generator().manual_seed(0))
    save_file(deeper.state_dict(), path)
    key, _ = READERS[reader]
    with refused(key, path, 2, NAME):
        reader(path)
    overrides = {"timm_name": NAME, "timm_overrides": json.dumps({**SHAPE, "num_heads": 4})}
    save_file(student().state_dict(), path, metadata=overrides)
    with refused(key, path, "'num_heads': 4", "'num_heads': 2"):
        reader(path)


def test_a_student_begins_with_the_files_tensors_and_fitted_positions(tmp_path):
    source = student()
    torch.save({"model": source.state_dict()}, tmp_path / "student.pth")
    larger = build_student(NAME, {**SHAPE, "img_size": 64}, generator=torch.Generator().manual_seed(1))
    expected = larger.pos_embed.clone()
    fill_student(larger, str(tmp_path / "student.pth"), ModelConfig(name=NAME, **{**SHAPE, "img_size": 64}))
    for name, tensor in source.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(larger.state_dict()[name], tensor), name
    assert torch.equal(larger.pos_embed, expected)


@pytest.mark.parametrize("img_size", [64, 16, 48])
def test_a_student_begins_with_learned_positions_of_another_grid(tmp_path, img_size):
    """Those of patches interpolated, that of CLS as it was; nothing of the student's own is left."""
    source = student()
    learned = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(3))
    torch.save({"model": {**source.state_dict(), "pos_embed": learned}}, tmp_path / "student.pth")
    shape = {**SHAPE, "img_size": img_size}
    begun = build_student(NAME, shape, generator=torch.Generator().manual_seed(1))
    note = fill_student(begun, str(tmp_path / "student.pth"), ModelConfig(name=NAME, **shape))
    side = img_size // 8
    # [1, 16, D] -> [1, D, 4, 4] -> [1, D, side, side] -> [1, side^2, D]
    square = learned[:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
    resized = torch.nn.functional.interpolate(square, (side, side), mode="bicubic", antialias=True)
    expected = torch.cat([learned[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(begun.pos_embed, expected)
    assert torch.equal(begun.pos_embed[:, 0], learned[:, 0])
    assert torch.equal(begun.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert f"4x4 -> {side}x{side}" in note and "interpolated" in note


def test_a_student_of_the_same_grid_keeps_its_positions_and_one_without_a_square_is_refused(tmp_path):
    learned = torch.randn(1, 17, 32)
    torch.save({**student().state_dict(), "pos_embed": learned}, tmp_path / "same.pth")
    begun = student()
    assert fill_student(begun, str(tmp_path / "same.pth"), NETWORK) == ""
    assert torch.equal(begun.pos_embed, learned)
    torch.save({**student().state_dict(), "pos_embed": torch.randn(1, 13, 32)}, tmp_path / "odd.pth")
    with refused("student.weights", "odd.pth", "student.name"):
        fill_student(student(), str(tmp_path / "odd.pth"), NETWORK)


def test_what_was_read_of_a_checkpoint_with_an_ema_is_said(tmp_path):
    good = student().state_dict()
    raw = {name: tensor * 0.5 for name, tensor in good.items()}
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": raw, "state_dict_ema": good, "arch": NAME}, path)
    begun = student()
    note = fill_student(begun, str(path), NETWORK)
    assert torch.equal(begun.cls_token, good["cls_token"])
    config = TeacherConfig(name=NAME, **SHAPE, weights=str(path))
    teacher = load_frozen_teacher(
        config, taps=("block/2",), whole_blocks=2, device=torch.device("cpu"), **PIXELS
    )
    assert torch.equal(teacher.vit.cls_token, good["cls_token"])
    for text in (note, *teacher.parts.notes):
        assert "state_dict_ema" in text and "EMA" in text


def test_a_student_without_weights_anywhere_names_its_key():
    with refused("student.weights 'nowhere'", "run folder"):
        fill_student(student(), "nowhere", NETWORK)
