"""Every format: a file of that layout gives the features of the network it was saved from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dmae_ds.errors import UserError
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.choose import choose_format
from dmae_ds.weights.fit import check_fit
from dmae_ds.weights.formats import FORMATS, Format
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.named import open_weights
from tests.teacher.references import (
    HF,
    IDS,
    ONE_OF_EACH,
    OTHERS,
    PICTURES,
    SHAPE,
    TAP,
    TAPS,
    Reference,
    as_pth,
    as_safetensors,
    assert_close,
    build_reference,
    changed,
    features,
    load,
    load_teacher,
    needed_by,
    refusal,
)


@pytest.fixture(scope="module", params=[*OTHERS, *HF])
def reference(request) -> Reference:
    return build_reference(request.param)


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "masked"])
def test_features_are_those_of_the_network_the_file_was_saved_from(tmp_path, reference, ids):
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    assert_close(features(teacher, ids), reference.features(PICTURES, ids))


@torch.no_grad()
def test_every_tensor_shows_in_the_features(tmp_path, reference):
    """So that no wrong place can hide behind a zero, or a part that is never run."""
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    before = features(teacher, IDS)
    for name, tensor in teacher.vit.state_dict().items():
        if name.startswith("blocks.1."):
            continue  # as blocks.0
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
    with pytest.raises(UserError):
        check_fit(needed | {"more": torch.empty(1)}, again, depth=TAP, may_resize=False)
    assert (
        again.container.bytes_read <= 3 * 2 * 96 * 4
    )  # qkv biases: under a format that splits them they must be looked at


@pytest.mark.parametrize("what", HF)
def test_every_way_in_which_transformers_saves_is_read(tmp_path, what):
    reference = build_reference(what)
    expected = reference.features(PICTURES, IDS)
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
        ("vit_small_patch16_224", SHAPE, "holds vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {**SHAPE, "num_heads": 4}, "the recipe's teacher is vit_tiny_patch16_224"),
    ],
)
def test_a_file_of_ours_is_held_against_what_it_says_of_itself(tmp_path, name, overrides, words):
    reference = build_reference("dmae_ds")
    path = reference.save(tmp_path, reference.tensors)
    other = Reference(**{**vars(reference), "name": name, "overrides": overrides})
    assert words in refusal(load, other, path)
    load(other, path, "timm")  # the shapes fit: only the metadata tell


@pytest.fixture
def my_lab(tmp_path, monkeypatch) -> None:
    """A module of the user's, with a map as a function and as a Format."""
    (tmp_path / "my_lab_maps.py").write_text(
        "from dmae_ds.weights.formats import Format\n"
        "def to_timm(name):\n"
        "    return None if name.startswith('probe.') else name.removeprefix('encoder.')\n"
        "nested = Format('of my lab', to_timm, entries=('net',))\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_lab_maps", None)


def test_a_map_of_the_user_s_own_is_imported(tmp_path, my_lab):
    reference = build_reference("timm")
    tensors = {f"encoder.{key}": tensor for key, tensor in reference.tensors.items()} | {
        "probe.weight": torch.ones(3)
    }
    expected = reference.features(PICTURES, IDS)
    assert_close(features(load(reference, as_pth()(tmp_path, tensors), "my_lab_maps:to_timm"), IDS), expected)
    assert_close(
        features(load(reference, as_pth("net", epoch=3)(tmp_path, tensors), "my_lab_maps:nested"), IDS),
        expected,
    )


@pytest.mark.parametrize(
    "format, words",
    [
        ("my_lab_maps:absent", "can't be imported"),
        ("my_lab_typo:to_timm", "can't be imported"),
        ("my_lab_maps:number", "int"),
    ],
)
def test_a_map_that_is_none_is_refused(tmp_path, my_lab, format, words):
    reference = build_reference("timm")
    assert words in refusal(load, reference, reference.save(tmp_path, reference.tensors), format)


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
        assert "fits the formats timm, swapped, with different tensors; set teacher.format" in refusal(
            choose, reference, path
        )
    assert choose(reference, path).format == "timm"
    spoilt = as_safetensors(tmp_path, changed(reference, tmp_path, "removed"), "spoilt.safetensors")
    assert "fits the teacher under no known format" in refusal(choose, reference, spoilt)
    assert "is not a file" in refusal(choose, reference, tmp_path / "absent.safetensors")
