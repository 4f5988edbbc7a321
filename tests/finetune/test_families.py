"""Students of other families in `eval finetune`, `eval linear`, k-NN and the report's views."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmae_ds.config.networks import ModelConfig
from dmae_ds.evaluate.knn import evaluate_run
from dmae_ds.finetune.network import build_classifier, classifier_kwargs, with_distillation_token
from dmae_ds.finetune.optim import layer_groups
from dmae_ds.finetune.run import evaluate
from dmae_ds.objectives.build import build_objective
from dmae_ds.train.collapse import CollapseMonitor
from tests.evaluate.conftest import STUDENT, make_run
from tests.finetune.conftest import PLAIN, finetune
from tests.messages import refused
from tests.objectives.small import config_for, make_batch

LINEAR = [
    "optim.global_batch=20",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "data.num_workers=0",
    "pool=mean",
]
NAMES = ["vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]
STATISTICS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


@pytest.mark.parametrize("name", NAMES)
def test_its_classifiers_and_neighbours_are_measured_and_timm_loads_them(tmp_path, shards, name):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1], objective="mae", student={"name": name})
    finetune(run, *PLAIN, "optim.epochs=1")
    evaluate("linear", str(run), recipe="linear_mae", overrides=LINEAR)
    student = load_file(run / "student.safetensors")
    for folder in ("finetune_mae", "linear_mae"):
        path = run / folder / "last.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        keys = json.loads(metadata["classifier"])["keys"]
        alone = timm.create_model(metadata["timm_name"], **json.loads(metadata["timm_overrides"]), **keys)
        tensors = load_file(path)
        alone.load_state_dict(tensors, strict=True)
        same = [torch.equal(tensors[key], student[key]) for key in student if key in tensors]
        assert all(same) if folder == "linear_mae" else not any(same[:1])
    assert evaluate_run(run, ks=[3])
    if "siglip" in name:
        with refused("cls", "CLS", "mean"):
            evaluate_run(run, ks=[3], pool="cls")


def test_registers_learn_at_the_rate_of_the_lowest_layer_and_no_token_is_added_next_to_them():
    network = ModelConfig(**{**STUDENT, "name": "vit_small_patch14_reg4_dinov2"})
    model = build_classifier(network, classifier_kwargs("cls", 3), seed=0, **STATISTICS)
    groups = layer_groups(model, weight_decay=0.1, layer_decay=0.5)
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates[id(model.reg_token)] == rates[id(model.cls_token)] == 0.5**3
    for name in ("vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
        network = ModelConfig(**{**STUDENT, "name": name})
        model = build_classifier(network, classifier_kwargs("cls", 3), seed=0, **STATISTICS)
        with refused("distillation token", "distill.method"):
            with_distillation_token(model, seed=0)
    with refused("pool", "vit_base_patch16_siglip_224"):
        siglip = ModelConfig(**{**STUDENT, "name": "vit_base_patch16_siglip_224"})
        build_classifier(siglip, classifier_kwargs("cls", 3), seed=0, **STATISTICS)


@pytest.mark.parametrize("name, has_cls", [(NAMES[0], True), (NAMES[2], False)])
def test_a_collapse_is_watched_in_the_tokens_that_there_are(name, has_cls):
    config = config_for({"name": "mae", "decoder": {"depth": 1, "embed_dim": 16, "num_heads": 2}})
    student = config.student.model_copy(update={"name": name, "embed_dim": 16})
    objective, _ = build_objective(config.model_copy(update={"student": student}))
    monitor = CollapseMonitor(objective.student)
    monitor.active = True
    seen = []
    objective.student.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    objective(objective.prepare(make_batch(20), lambda pixels: pixels / 255.0), {})
    numbers = monitor.measure()
    assert ("rank/cls" in numbers) == ("spread/cls" in numbers) == has_cls
    patches = seen[0][:, -objective.num_visible :].mean(dim=1)
    common = patches.mean(dim=0).square().sum() / patches.square().sum(dim=1).mean()
    torch.testing.assert_close(numbers["spread/mean"], (1 - common).detach())
    assert seen[0].shape[1] == objective.num_visible + has_cls
