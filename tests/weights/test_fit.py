"""A file that is not surely this teacher's is one line that names the tensors and what the file looks like."""

from __future__ import annotations

import json

import pytest
import torch

from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.fit import fits
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import map_names, open_weights
from tests.teacher.references import (
    IDS,
    ONE_OF_EACH,
    OTHERS,
    PICTURES,
    SHAPE,
    Reference,
    as_safetensors,
    assert_close,
    build_reference,
    changed,
    features,
    fit,
    load,
    refusal,
)


@pytest.mark.parametrize(
    "change, words",
    [
        ("removed", "missing 1: {name}.weight"),
        ("renamed", "missing 1: {name}.weight; unexpected 1: {name}.weightx"),
        ("transposed", "misshapen 1: {name}.weight [32, "),
        ("another", "unexpected 1: {name}.bonus"),
    ],
)
@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_a_spoilt_tensor_is_named(tmp_path, what, change, words):
    reference = build_reference(what)
    message = refusal(fit, reference, reference.save(tmp_path, changed(reference, tmp_path, change)))
    assert words.format(name=f"blocks.0.{reference.first_matrix}") in message


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
    assert "missing 1: " + key.replace("register_tokens", "reg_token").replace(
        "storage_tokens", "reg_token"
    ) in refusal(fit, reference, reference.save(tmp_path, tensors))


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_third_of_a_joined_matrix_is_missed(tmp_path, part):
    reference = build_reference("hf-vit")
    tensors = {
        name: tensor
        for name, tensor in reference.tensors.items()
        if name != f"encoder.layer.1.attention.attention.{part}.weight"
    }
    assert "misshapen 1: blocks.1.attn.qkv.weight [64, 32] instead of [96, 32]" in refusal(
        fit, reference, reference.save(tmp_path, tensors)
    )


@pytest.mark.parametrize(
    "what", [what for what in OTHERS if what.startswith("dinov3") and not what.endswith("qkvb")]
)
def test_a_qkv_bias_that_the_teacher_lacks_is_refused_unless_it_is_zero(tmp_path, what):
    reference = build_reference(what)
    tensors = {key: tensor.clone() for key, tensor in reference.tensors.items()}
    (key,) = (key for key in tensors if key.endswith("blocks.1.attn.qkv.bias"))
    tensors[key][5] = 1e-6  # a query's
    assert "unexpected 1: blocks.1.attn.q_bias" in refusal(fit, reference, reference.save(tmp_path, tensors))
    tensors[key][5], tensors[key][40] = 0, 3.0  # a key's: masked away
    assert_close(
        features(load(reference, reference.save(tmp_path, tensors)), IDS), reference.features(PICTURES, IDS)
    )


def test_transformers_biases_that_the_teacher_lacks_are_refused_unless_they_are_zero(tmp_path):
    reference = build_reference("hf-dinov3")
    unbiased = Reference(**{**vars(reference), "name": "vit_small_patch16_dinov3"})
    assert "unexpected 4: blocks.0.attn." in refusal(
        fit, unbiased, reference.save(tmp_path, reference.tensors)
    )
    zeroed = {
        key: torch.zeros_like(t) if key.endswith(("q_proj.bias", "v_proj.bias")) else t
        for key, t in reference.tensors.items()
    }
    fit(unbiased, reference.save(tmp_path, zeroed))


@pytest.mark.parametrize(
    "what, format, words",
    [
        ("hf-mae", "timm", "transformers' ViT-MAE with its decoder (format hf): try teacher.format=hf"),
        ("hf-vit", "mae", "transformers' ViT or DINOv2 encoder (format hf): try teacher.format=hf"),
        ("hf-classifier", "timm", "try teacher.format=hf"),
        ("hf-dinov2", "dinov2", "try teacher.format=hf"),
        ("hf-dinov2-registers", "dinov2", "try teacher.format=hf"),
        ("hf-dinov3", "dinov3", "transformers' DINOv3 (format hf): try teacher.format=hf"),
        ("dinov2-registers", "timm", "a published DINOv2 (format dinov2): try teacher.format=dinov2"),
        ("dinov2-giant", "timm", "try teacher.format=dinov2"),
        ("dinov3", "timm", "a published DINOv3 (format dinov3): try teacher.format=dinov3"),
        ("dinov3-gated-qkvb", "dinov2", "try teacher.format=dinov3"),
        ("timm-registers", "dinov2", "try teacher.format=timm"),
        ("dinov2-registers", "hf", "try teacher.format=dinov2"),
        ("dmae_ds", "hf", "an encoder without a decoder: try teacher.format=timm"),
        (
            "mae",
            "timm",
            "holds model, expected an entry 'state_dict' or a plain dict of tensors; try teacher.format=mae",
        ),
        ("mae-training", "hf", "try teacher.format=mae"),
        (
            "timm-pth",
            "mae",
            "holds state_dict, epoch, expected an entry 'model' or a plain dict of tensors; try teacher.format=timm",
        ),
        (
            "dinov2-training",
            "mae",
            "holds teacher, expected an entry 'model' or a plain dict of tensors; try teacher.format=dinov2 or dinov3",
        ),
        (
            "timm",
            "dmae_ds",
            "was not written by this project (it names no network); set teacher.format to timm",
        ),
        ("timm", "mea", "teacher.format 'mea' can't be imported"),
    ],
)
def test_a_wrong_format_names_the_right_one(tmp_path, what, format, words):
    reference = build_reference(what)
    assert words in refusal(
        load if format == "dmae_ds" else fit, reference, reference.save(tmp_path, reference.tensors), format
    )


def test_a_file_of_another_size_suggests_no_format(tmp_path):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    wide = Reference(**{**vars(reference), "overrides": {**SHAPE, "embed_dim": 48}})
    message = refusal(fit, wide, path)
    assert "cls_token [1, 1, 32] instead of [1, 1, 48]" in message
    assert "an encoder without a decoder" in message and "try teacher.format" not in message


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


def test_parts_that_do_not_go_together_are_no_matter_in_a_block_that_stays_in_the_file(tmp_path):
    reference, key = build_reference("hf-vit"), "encoder.layer.{}.attention.attention.query.weight"
    for block in (2, 1):
        tensors = reference.tensors | {key.format(block): torch.ones(32, 16)}
        path = reference.save(tmp_path, tensors)
        if block == 2:
            assert_close(features(load(reference, path), IDS), reference.features(PICTURES, IDS))
        else:
            assert (
                "misshapen 1: blocks.1.attn.qkv.weight [32, 16] + [32, 32] + [32, 32] instead of [96, 32]"
                in refusal(fit, reference, path)
            )


def test_two_names_for_one_tensor_are_refused(tmp_path):
    reference = build_reference("dinov2")
    path = reference.save(tmp_path, reference.tensors | {"backbone.cls_token": torch.zeros(1, 1, 32)})
    assert "holds cls_token twice as format dinov2: 'cls_token' and 'backbone.cls_token'" in refusal(
        load, reference, path
    )


def test_what_stays_in_the_file_is_told_part_by_part(tmp_path):
    dropped = {
        what: load(
            build_reference(what), build_reference(what).save(tmp_path, build_reference(what).tensors)
        ).parts.describe_dropped()
        for what in ("mae", "dinov2")
    }
    assert dropped["mae"].startswith("block 3, decoder, norm: ")
    assert dropped["dinov2"].startswith("block 3, mask_token, norm: ")


def test_a_missing_part_matters_where_a_needed_tensor_is_in_it(tmp_path):
    reference = build_reference("timm")
    parts = {
        "one.safetensors": ("blocks.0.", "blocks.1.", "cls_token", "pos_embed", "patch_embed"),
        "two.safetensors": ("blocks.2.", "norm"),
    }
    for part, starts in parts.items():
        as_safetensors(
            tmp_path,
            {key: tensor for key, tensor in reference.tensors.items() if key.startswith(starts)},
            part,
        )
    weight_map = {
        key: part for part, starts in parts.items() for key in reference.tensors if key.startswith(starts)
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "two.safetensors").unlink()
    assert_close(features(load(reference, tmp_path), IDS), reference.features(PICTURES, IDS))
    as_safetensors(
        tmp_path,
        {
            key: tensor
            for key, tensor in reference.tensors.items()
            if key.startswith(parts["two.safetensors"])
        },
        "two.safetensors",
    )
    (tmp_path / "one.safetensors").unlink()
    message = refusal(load, reference, tmp_path)
    assert "missing 28: cls_token, " in message and "not here: one.safetensors" in message
