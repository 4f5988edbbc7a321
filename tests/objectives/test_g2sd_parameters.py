"""What the specific stage of G2SD trains, at which rate and decay: heads, tokens, positional embedding."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.objectives.build import build_objective
from dmae_ds.train.optim import build_optimizer
from tests.objectives import small
from tests.objectives.test_g2sd_specific import (
    CLASSES,
    NORMALIZE,
    build,
    load,
    make_batch,
    recipe,
    write_classifier,
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("teacher") / "classifier.safetensors", global_pool="avg")


def test_the_top_layer_has_the_token_and_the_heads(classifier):
    config = recipe(classifier)
    objective, _ = build_objective(config, num_classes=CLASSES)
    groups = build_optimizer(objective, config.optim.model_copy(update={"layer_decay": 0.75})).param_groups
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    scale = {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}
    decay = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert scale.keys() == dict(objective.named_parameters()).keys()
    for name in ("dist_token", "head.weight", "head_dist.bias", "student.norm.weight"):
        assert scale[name] == 1
    assert decay["dist_token"] == 0.05 and decay["student.norm.weight"] == decay["student.cls_token"] == 0
    assert scale["student.blocks.1.attn.qkv.weight"] == pytest.approx(0.75) and scale[
        "student.blocks.0.norm1.bias"
    ] == pytest.approx(0.75**2)
    for name in ("student.patch_embed.proj.weight", "student.cls_token", "student.pos_embed"):
        assert scale[name] == pytest.approx(0.75**3)
    assert decay["student.pos_embed"] == 0 and decay["student.patch_embed.proj.weight"] == 0.05


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_the_positional_embedding_of_cls_and_of_every_patch_is_trained(classifier, layer_decay):
    config = recipe(classifier)
    objective, shapes = build_objective(config, num_classes=CLASSES)
    optim = config.optim.model_copy(update={"layer_decay": layer_decay, "weight_decay": 0.5})
    optimizer = build_optimizer(objective, optim)
    (group,) = [
        group
        for group in optimizer.param_groups
        if any(parameter is objective.student.pos_embed for parameter in group["params"])
    ]
    assert group["weight_decay"] == 0
    before = objective.student.pos_embed.detach().clone()
    masked = objective.prepare(make_batch([0, 1, 2, 3]), NORMALIZE)
    with torch.no_grad():
        objective.head.weight.normal_()
    objective(masked, load(config, objective, shapes[""]).features(masked))["loss"].backward()
    optimizer.step()
    moved = (objective.student.pos_embed.detach() - before).abs().amax(dim=2)[0]
    assert moved.shape == (17,) and bool((moved > 0).all())


def test_every_other_objective_keeps_the_positional_embedding_fixed(classifier):
    for objective in ("mae", "sdae", "dino", "mocov3"):
        section = {"name": objective}
        built = small.build(section, seed=1)
        assert "student.pos_embed" in dict(built.named_buffers()), objective
        assert not small.config_for(section).objective.trains_positions
    trained, _ = build(classifier)
    assert "student.pos_embed" in dict(trained.named_parameters())
    assert recipe(classifier).objective.trains_positions
