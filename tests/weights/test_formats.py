"""Formats: a file of each layout gives the features of the network that it was saved from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.choose import choose_format
from dmae_ds.weights.fit import check_fit
from dmae_ds.weights.formats import FORMATS, Format
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.named import open_weights
from tests.messages import refused
from tests.teacher.hf_networks import HF
from tests.teacher.layouts import OTHERS
from tests.teacher.reference import IDS, SHAPE, TAP, Reference, as_pth, as_safetensors
from tests.teacher.references import (
    IMAGES,
    ONE_OF_EACH,
    TAPS,
    assert_close,
    build_reference,
    changed,
    features,
    load,
    load_teacher,
    needed_by,
)


@pytest.fixture(scope="module", params=[*OTHERS, *HF])
def reference(request) -> Reference:
    return build_reference(request.param)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "masked"])
def test_features_are_those_of_the_network_the_file_was_saved_from(tmp_path, reference, ids):
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    assert_close(features(teacher, ids), reference.features(IMAGES, ids))


@torch.no_grad()
def test_every_tensor_shows_in_the_features(tmp_path, reference):
    """No wrong place can hide behind a zero, or in a part that is never run."""
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    before = features(teacher, IDS)
    for name, tensor in teacher.vit.state_dict().items():
        if name.startswith("blocks.1."):
            continue  # like blocks.0
        kept = tensor.clone()
        tensor.copy_(tensor.flip(0, -1) if tensor.ndim > 1 else tensor.flip(0))
        assert not torch.allclose(features(teacher, IDS), before, rtol=1e-3), name
        tensor.copy_(kept)


@pytest.mark.parametrize("what", ["timm", "timm-pth", "mae-training", "dinov2-giant", "hf-vit"])
def test_loading_reads_every_needed_tensor_once_and_checking_none(tmp_path, what):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    weights = open_weights(path, reference.format)
    needed = needed_by(reference.name, tuple(reference.overrides.items()))
    check_fit(needed, weights, depth=TAP, may_resize=False)
    assert weights.container.bytes_read == 0
    load_teacher(
        reference.name,
        reference.overrides,
        whole_blocks=3,
        weights=weights,
        taps=TAPS,
        dtype="fp32",
        device=torch.device("cpu"),
    )
    assert weights.container.bytes_read == sum(tensor.nbytes for tensor in needed.values())
    again = choose(reference, path)
    with refused("missing 1: more"):
        check_fit(needed | {"more": torch.empty(1)}, again, depth=TAP, may_resize=False)
    # qkv biases: under a format that splits them they must be looked at
    assert again.container.bytes_read <= 3 * 2 * 96 * 4


@pytest.mark.parametrize("what", HF)
def test_every_way_in_which_transformers_saves_is_read(tmp_path, what):
    reference = build_reference(what)
    expected = reference.features(IMAGES, IDS)
    reference.model.save_pretrained(tmp_path / "folder")
    reference.model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    (tmp_path / "bin").mkdir()
    torch.save(reference.tensors, tmp_path / "bin" / "pytorch_model.bin")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for folder in ("folder", "sharded", "bin"):
        assert_close(features(load(reference, tmp_path / folder), IDS), expected)


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("vit_small_patch16_224", SHAPE, ["vit_tiny_patch16_224", "vit_small_patch16_224"]),
        ("vit_tiny_patch16_224", {**SHAPE, "num_heads": 4}, ["teacher", "'num_heads': 2", "'num_heads': 4"]),
    ],
)
def test_the_network_that_a_file_of_ours_names_must_be_the_recipes(tmp_path, name, overrides, words):
    reference = build_reference("dmae_ds")
    path = reference.save(tmp_path, reference.tensors)
    other = Reference(**{**vars(reference), "name": name, "overrides": overrides})
    with refused("teacher.weights", "teacher.name", *words):
        load(other, path)
    load(other, path, "timm")  # the shapes fit: only the metadata differ


@pytest.fixture
def my_lab(tmp_path, monkeypatch) -> None:
    """A module of the user's with a key map, as a function and as a Format."""
    (tmp_path / "my_lab_maps.py").write_text(
        "from dmae_ds.weights.formats import Format\n"
        "def to_timm(name):\n"
        "    return None if name.startswith('probe.') else name.removeprefix('encoder.')\n"
        "nested = Format('of my lab', to_timm, entries=('net',))\n"
        "def deep(name):\n"
        "    return to_timm(name[4:]) if name.startswith('net.') else None\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_lab_maps", None)


def test_a_map_of_the_users_own_is_imported(tmp_path, my_lab):
    reference = build_reference("timm")
    tensors = {f"encoder.{key}": tensor for key, tensor in reference.tensors.items()} | {
        "probe.weight": torch.ones(3)
    }
    expected = reference.features(IMAGES, IDS)
    assert_close(features(load(reference, as_pth()(tmp_path, tensors), "my_lab_maps:to_timm"), IDS), expected)
    nested = as_pth("net", epoch=3, other={"x": torch.ones(2)})(tmp_path, tensors)
    for format in ("my_lab_maps:nested", "my_lab_maps:deep"):
        assert_close(features(load(reference, nested, format), IDS), expected)


@pytest.mark.parametrize(
    "format, words",
    [
        ("my_lab_maps:absent", ["absent"]),
        ("my_lab_typo:to_timm", ["my_lab_typo", "module:function"]),
        ("my_lab_maps:number", ["int", "Format"]),
    ],
)
def test_a_key_map_that_can_not_be_used_is_refused(tmp_path, my_lab, format, words):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    with refused(f"teacher.format '{format}'", *words):
        load(reference, path, format)


def choose(reference: Reference, path: Path):
    vit = meta_teacher(reference.name, reference.overrides, TAP)
    return choose_format(path, vit.state_dict(), depth=TAP, may_resize=True, label=TEACHER)


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_auto_takes_the_one_map_that_covers(tmp_path, what):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    # Maps that name the same tensors are one, under the first one's name: a file of ours has timm's names.
    assert choose(reference, path).format == {"dmae_ds": "timm"}.get(what, reference.format)


def test_auto_refuses_what_no_map_covers_and_what_two_do(tmp_path, monkeypatch):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    swapped = Format(
        "norms the other way round",
        lambda name: name.replace("norm1", "norm0").replace("norm2", "norm1").replace("norm0", "norm2"),
    )
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "swapped", swapped)
        with refused("teacher.weights", "timm, swapped", "teacher.format"):
            choose(reference, path)
    assert choose(reference, path).format == "timm"
    other = as_safetensors(tmp_path, changed(reference, tmp_path, "removed"), "other.safetensors")
    with refused("other.safetensors", "no known format", "nearest is timm", "missing 1", "teacher.name"):
        choose(reference, other)
    with refused("absent.safetensors", "is not a file"):
        choose(reference, tmp_path / "absent.safetensors")


def test_the_earlier_import_of_open_weights_works():
    from dmae_ds.teacher import formats

    assert formats.open_weights is open_weights
