"""Trunks are read strictly, positional embeddings are fitted, and timm alone loads saved classifiers."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmae_ds.config.evaluation import DistillConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.evaluate.features import load_student
from dmae_ds.finetune.network import (
    build_classifier,
    classifier_kwargs,
    fill_trunk,
    load_teacher,
    save_classifier,
)
from tests.evaluate.conftest import STEP, STUDENT
from tests.messages import refused

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.5, 0.5)}
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def build(pool="mean", norm_first=False, **changes):
    network = ModelConfig(**{**STUDENT, **changes})
    return build_classifier(
        network, classifier_kwargs(pool, 3, norm_first=norm_first), seed=0, **STATISTICS
    ), network


@pytest.mark.parametrize("format", ["auto", "dmae_ds", "timm"])
def test_a_student_file_fills_everything_but_the_head(run, format):
    student = load_student(run)
    for pool in ("mean", "cls"):
        model, network = build(pool, norm_first=True)
        assert fill_trunk(model, run / "student.safetensors", format, network)[0] == STEP
        model.eval()
        tokens = student.forward_features(IMAGES)
        expected = tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]
        torch.testing.assert_close(
            model.forward_head(model.forward_features(IMAGES), pre_logits=True), expected
        )
        assert 0 < model.head.weight.std() < 1e-4 and not model.head.bias.any()


def test_fine_tuning_with_mean_pooling_norms_after_the_mean(run):
    model, network = build("mean")
    fill_trunk(model, run / "student.safetensors", "auto", network)
    assert isinstance(model.norm, torch.nn.Identity) and torch.equal(model.fc_norm.weight, torch.ones(24))
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_student(run).blocks[0].attn.qkv.weight)


def test_initial_weights_depend_on_the_seed_alone():
    network = ModelConfig(**STUDENT)
    one, torch_moved_on, other = (
        build_classifier(network, classifier_kwargs("mean", 3), seed=seed, **STATISTICS).state_dict()
        for seed in (4, 4, 5)
    )
    assert all(torch.equal(one[name], torch_moved_on[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"]) and not torch.equal(
        one["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"]
    )


def test_positional_embeddings_are_fitted_to_another_image_size(run):
    model, network = build(img_size=32)
    _, note = fill_trunk(model, run / "student.safetensors", "auto", network)
    assert "4x4 -> 8x8" in note
    learned = load_file(run / "student.safetensors")
    learned["pos_embed"] = torch.randn(1, 17, 24)
    save_file(learned, run / "learned.safetensors")
    _, note = fill_trunk(model, run / "learned.safetensors", "auto", network)
    assert "interpolated: 4x4 -> 8x8" in note
    expected = timm.layers.resample_abs_pos_embed(learned["pos_embed"], new_size=[8, 8], old_size=[4, 4])
    torch.testing.assert_close(model.pos_embed.detach(), expected)


def test_the_published_pth_is_read_without_its_decoder(run):
    tensors = {
        **load_file(run / "student.safetensors"),
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.zeros(8, 24),
    }
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, run / "mae.pth")
    model, network = build("cls")
    _, note = fill_trunk(model, run / "mae.pth", "mae", network)
    assert "decoder" in note and torch.equal(model.norm.weight, tensors["norm.weight"])


def test_weights_that_do_not_fit_are_refused_with_the_keys_of_this_command(run):
    weights = load_file(run / "student.safetensors")
    cases = {
        "missing": (
            {name: weights[name] for name in weights if name != "cls_token"},
            {},
            ("missing", "cls_token"),
        ),
        "deeper": (weights, {"depth": 1}, ("blocks", 1)),
        "wider": (weights, {"embed_dim": 32}, ("format",)),
    }
    for name, (tensors, changes, words) in cases.items():
        file = run / f"{name}.safetensors"
        save_file(tensors, file)
        model, network = build("cls", **changes)
        with refused("weights", file, *words) as error:
            fill_trunk(model, file, "auto" if name == "wider" else "timm", network)
        assert "teacher." not in str(error.value)
    save_file(
        weights,
        run / "heads.safetensors",
        metadata={
            "timm_name": STUDENT["name"],
            "timm_overrides": json.dumps({k: v for k, v in STUDENT.items() if k != "name"}),
        },
    )
    model, network = build("cls", num_heads=3)
    with refused("num_heads", 2, 3):
        fill_trunk(model, run / "heads.safetensors", "timm", network)
    with refused("network.name", "resnet18", "vit_base_patch16_224"):
        build_classifier(ModelConfig(name="resnet18"), {}, seed=0, **STATISTICS)


def saved(path, pool="mean", num_classes=3, **changes):
    network = ModelConfig(**{**STUDENT, **changes})
    kwargs = classifier_kwargs(pool, num_classes, drop_path=0.1)
    model = build_classifier(network, kwargs, seed=3, **STATISTICS)
    torch.nn.init.normal_(model.head.weight)
    save_classifier(path, model.state_dict(), network, kwargs, **STATISTICS, step=7, top1=12.5)
    return model.eval()


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_alone_loads_a_saved_classifier(tmp_path, pool):
    model = saved(tmp_path / "best.safetensors", pool)
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        metadata = file.metadata()
    alone = timm.create_model(
        metadata["timm_name"],
        **json.loads(metadata["timm_overrides"]),
        **json.loads(metadata["classifier"])["keys"],
    )
    alone.load_state_dict(load_file(tmp_path / "best.safetensors"), strict=True)
    torch.testing.assert_close(alone.eval()(IMAGES), model(IMAGES))
    assert metadata["step"] == "7" and metadata["top1"] == "12.5" and not list(tmp_path.glob("*.tmp"))


def test_a_saved_classifier_is_a_teacher_with_its_own_statistics(tmp_path):
    model = saved(tmp_path / "best.safetensors", depth=3)
    config = DistillConfig(method="logits", temperature=1.0, teacher=str(tmp_path / "best.safetensors"))
    teacher = load_teacher(config, num_classes=3, img_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(teacher(IMAGES), model(IMAGES))
    assert tuple(teacher.pretrained_cfg["mean"]) == STATISTICS["mean"] and not any(
        parameter.requires_grad for parameter in teacher.parameters()
    )
    for arguments, words in (
        ({"num_classes": 5, "img_size": 16}, ("distill.teacher", "3 classes", "data.train has 5")),
        ({"num_classes": 3, "img_size": 32}, ("distill.teacher", "16 px", "32 px", "network.img_size")),
    ):
        with refused(*words):
            load_teacher(config, **arguments, mean=(0, 0, 0), std=(1, 1, 1))


def test_another_program_s_classifier_is_a_teacher_by_its_timm_name(run, tmp_path):
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, global_pool="avg")
    torch.save({"model": other.state_dict()}, tmp_path / "finetuned.pth")
    keys = {"method": "features", "teacher": str(tmp_path / "finetuned.pth")}
    teacher = load_teacher(
        DistillConfig(**keys, name="vit_tiny_patch16_224", format="mae"),
        num_classes=3,
        img_size=32,
        **STATISTICS,
    )
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher(images), other.eval()(images))
    for changes in ({}, {"teacher": str(run / "student.safetensors")}):
        with refused("distill.teacher") as error:
            load_teacher(DistillConfig(**{**keys, **changes}), num_classes=3, img_size=32, **STATISTICS)
        assert "teacher.weights" not in str(error.value)
