"""A file that doesn't surely belong to a teacher is refused: its tensors and the kind of file are named."""

from __future__ import annotations

import json

import pytest
import torch

from dmae_ds.output.units import size_text
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.fit import check_fit, fits
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import map_names, open_weights
from tests.messages import refused
from tests.teacher.layouts import OTHERS
from tests.teacher.reference import IDS, SHAPE, TAP, Reference, as_safetensors
from tests.teacher.references import (
    IMAGES,
    ONE_OF_EACH,
    assert_close,
    build_reference,
    changed,
    features,
    fit,
    load,
    needed_by,
)


@pytest.mark.parametrize(
    "change, words",
    [
        ("removed", ["missing 1: {name}.weight"]),
        ("renamed", ["missing 1: {name}.weight", "unexpected 1: {name}.weightx"]),
        ("transposed", ["misshapen 1: {name}.weight [32, "]),
        ("another", ["unexpected 1: {name}.bonus"]),
    ],
)
@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_a_changed_tensor_is_named(tmp_path, what, change, words):
    reference = build_reference(what)
    path = reference.save(tmp_path, changed(reference, tmp_path, change))
    name = f"blocks.0.{reference.first_matrix}"
    with refused(*(word.format(name=name) for word in words)):
        fit(reference, path)


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_every_tensor_is_missed_where_it_is_removed(tmp_path, what):
    reference = build_reference(what)
    needed = meta_teacher(reference.name, reference.overrides, 1).state_dict()
    weights = open_weights(reference.save(tmp_path, reference.tensors), reference.format)
    assert fits(needed, weights, depth=1, may_resize=False)
    for key in {key for name in needed for key in weights.sources[name].names}:
        place = weights.container.places.pop(key)
        mapped = map_names(weights.container, reference.format)
        assert not fits(needed, mapped, depth=1, may_resize=False), key
        weights.container.places[key] = place


@pytest.mark.parametrize(
    "what, key",
    [
        ("dinov2-registers", "cls_token"),
        ("dinov2-registers", "pos_embed"),
        ("dinov2-registers", "register_tokens"),
        ("dinov3", "storage_tokens"),
    ],
)
def test_a_network_with_registers_misses_each_of_its_tokens(tmp_path, what, key):
    reference = build_reference(what)
    tensors = {name: tensor for name, tensor in reference.tensors.items() if name != key}
    timm_name = "reg_token" if key in ("register_tokens", "storage_tokens") else key
    with refused(f"missing 1: {timm_name}"):
        fit(reference, reference.save(tmp_path, tensors))


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_third_of_a_joined_matrix_is_missed(tmp_path, part):
    reference = build_reference("hf-vit")
    tensors = {
        name: tensor
        for name, tensor in reference.tensors.items()
        if name != f"encoder.layer.1.attention.attention.{part}.weight"
    }
    with refused("misshapen 1: blocks.1.attn.qkv.weight", [64, 32], [96, 32]):
        fit(reference, reference.save(tmp_path, tensors))


@pytest.mark.parametrize(
    "what", [what for what in OTHERS if what.startswith("dinov3") and not what.endswith("qkvb")]
)
def test_a_qkv_bias_that_the_teacher_lacks_is_refused_unless_it_is_zero(tmp_path, what):
    reference = build_reference(what)
    tensors = {key: tensor.clone() for key, tensor in reference.tensors.items()}
    (key,) = (key for key in tensors if key.endswith("blocks.1.attn.qkv.bias"))
    tensors[key][5] = 1e-6  # a query's
    with refused("unexpected 1: blocks.1.attn.q_bias"):
        fit(reference, reference.save(tmp_path, tensors))
    tensors[key][5], tensors[key][40] = 0, 3.0  # a key's: masked away
    assert_close(
        features(load(reference, reference.save(tmp_path, tensors)), IDS), reference.features(IMAGES, IDS)
    )


def test_transformers_biases_that_the_teacher_lacks_are_refused_unless_they_are_zero(tmp_path):
    reference = build_reference("hf-dinov3")
    unbiased = Reference(**{**vars(reference), "name": "vit_small_patch16_dinov3"})
    with refused("unexpected 4: blocks.0.attn."):
        fit(unbiased, reference.save(tmp_path, reference.tensors))
    zeroed = {
        key: torch.zeros_like(t) if key.endswith(("q_proj.bias", "v_proj.bias")) else t
        for key, t in reference.tensors.items()
    }
    fit(unbiased, reference.save(tmp_path, zeroed))


HF_MAE, HF_VIT, HF_DINOV3 = "transformers' ViT-MAE", "transformers' ViT", "transformers' DINOv3"


@pytest.mark.parametrize(
    "what, format, words",
    [
        ("hf-mae", "timm", [HF_MAE, "teacher.format=hf"]),
        ("hf-vit", "mae", [HF_VIT, "teacher.format=hf"]),
        ("hf-classifier", "timm", ["teacher.format=hf"]),
        ("hf-dinov2", "dinov2", ["teacher.format=hf"]),
        ("hf-dinov2-registers", "dinov2", ["teacher.format=hf"]),
        ("hf-dinov3", "dinov3", [HF_DINOV3, "teacher.format=hf"]),
        ("dinov2-registers", "timm", ["DINOv2", "teacher.format=dinov2"]),
        ("dinov2-giant", "timm", ["teacher.format=dinov2"]),
        ("dinov3", "timm", ["DINOv3", "teacher.format=dinov3"]),
        ("dinov3-gated-qkvb", "dinov2", ["teacher.format=dinov3"]),
        ("timm-registers", "dinov2", ["teacher.format=timm"]),
        ("dinov2-registers", "hf", ["teacher.format=dinov2"]),
        ("dmae_ds", "hf", ["encoder", "teacher.format=timm"]),
        ("mae-training", "hf", ["teacher.format=mae"]),
        ("dinov2-training", "mae", ["DINOv2", "teacher.format=dinov2"]),
        ("timm", "dmae_ds", ["names no network", "set teacher.format to timm"]),
        ("timm", "mea", ["teacher.format 'mea'", "dinov2", "auto"]),
    ],
)
def test_a_wrong_format_names_the_right_one(tmp_path, what, format, words):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    with refused(*words):
        (load if format == "dmae_ds" else fit)(reference, path, format)


def test_a_file_of_another_size_suggests_no_format(tmp_path):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    wide = Reference(**{**vars(reference), "overrides": {**SHAPE, "embed_dim": 48}})
    with refused("cls_token", [1, 1, 32], [1, 1, 48], "encoder") as error:
        fit(wide, path)
    assert "teacher.format=" not in str(error.value)


@pytest.mark.parametrize(
    "what, kind",
    [
        ("timm", "an encoder without a decoder"),
        ("mae", "a whole MAE, encoder and decoder (format mae)"),
        ("mae-finetuned", "a classifier (format timm or mae)"),
        ("hf-mae", "transformers' ViT-MAE with its decoder"),
        ("hf-vit", "transformers' ViT or DINOv2 encoder"),
        ("hf-classifier", "transformers' ViT or DINOv2 encoder"),
        ("hf-dinov3", "transformers' DINOv3"),
        ("dinov2-registers", "a published DINOv2"),
        ("dinov2-training", "a published DINOv2"),
        ("dinov3", "a published DINOv3"),
    ],
)
def test_a_file_is_described_by_its_names(what, kind):
    assert describe_kind(list(build_reference(what).tensors)).startswith(kind)


def test_pieces_that_do_not_go_together_matter_only_in_a_block_that_is_read(tmp_path):
    reference, key = build_reference("hf-vit"), "encoder.layer.{}.attention.attention.query.weight"
    for block in (2, 1):
        tensors = reference.tensors | {key.format(block): torch.ones(32, 16)}
        path = reference.save(tmp_path, tensors)
        if block == 2:
            assert_close(features(load(reference, path), IDS), reference.features(IMAGES, IDS))
        else:
            with refused("misshapen 1: blocks.1.attn.qkv.weight", [32, 16], [96, 32]):
                fit(reference, path)


def test_two_names_for_one_tensor_are_refused(tmp_path):
    reference = build_reference("dinov2")
    path = reference.save(tmp_path, reference.tensors | {"backbone.cls_token": torch.zeros(1, 1, 32)})
    with refused("cls_token twice", "dinov2", "'backbone.cls_token'"):
        load(reference, path)


def test_what_stays_in_the_file_is_described_part_by_part(tmp_path):
    for what, parts in (("mae", "block 3, decoder, norm: "), ("dinov2", "block 3, mask_token, norm: ")):
        reference = build_reference(what)
        teacher = load(reference, reference.save(tmp_path, reference.tensors))
        assert teacher.parts.describe_dropped().startswith(parts)


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("timm", {}),
        ("mae", {"head.weight": torch.ones(7, 32)}),
        (
            "timm-pth",
            {"head.bias": torch.ones(7, dtype=torch.bfloat16), "norm.weight": torch.ones(32).double()},
        ),
        ("hf-vit", {"pooler.dense.weight": torch.ones(32, 32).half()}),
        ("dinov2", {"ibot_head.last": torch.ones(5)}),
    ],
)
def test_the_bytes_that_stay_in_the_file_are_those_of_the_tensors_that_are_not_needed(tmp_path, what, more):
    """By hand: what the file holds less what the teacher's tensors are made of, in the file's dtypes."""
    reference = build_reference(what)
    tensors = reference.tensors | more
    weights = open_weights(reference.save(tmp_path, tensors), reference.format)
    needed = needed_by(reference.name, tuple(reference.overrides.items()))
    used = {key for name in needed for key in weights.sources[name].names}
    left = sum(tensor.numel() * tensor.element_size() for key, tensor in tensors.items() if key not in used)
    dropped = check_fit(needed, weights, depth=TAP, may_resize=False)
    assert dropped.num_bytes == left > 0
    text = load(reference, weights.path).parts.describe_dropped()
    assert text.endswith(f"{dropped.parameters / 1e6:.1f} M parameters, {size_text(left)}")


def test_a_missing_file_matters_where_a_needed_tensor_is_in_it(tmp_path):
    reference = build_reference("timm")
    starts = {
        "one.safetensors": ("blocks.0.", "blocks.1.", "cls_token", "pos_embed", "patch_embed"),
        "two.safetensors": ("blocks.2.", "norm"),
    }
    of_file = {
        file: {key: tensor for key, tensor in reference.tensors.items() if key.startswith(start)}
        for file, start in starts.items()
    }
    weight_map = {key: file for file, tensors in of_file.items() for key in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    as_safetensors(tmp_path, of_file["one.safetensors"], "one.safetensors")
    assert_close(features(load(reference, tmp_path), IDS), reference.features(IMAGES, IDS))
    as_safetensors(tmp_path, of_file["two.safetensors"], "two.safetensors")
    (tmp_path / "one.safetensors").unlink()
    with refused("missing 28: cls_token", "one.safetensors"):
        load(reference, tmp_path)
