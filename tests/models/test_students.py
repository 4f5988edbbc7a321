"""Students of every family: timm's own outputs, initial weights, gradients; and what a family lacks."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch

from dmae_ds.config.networks import ModelConfig
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT, build_student
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.initial import fill_student
from tests.messages import refused
from tests.objectives.small import TEACHER, config_for, make_batch
from tests.teacher.reference import IDS, SHAPE, TAP, Reference, timm_reference
from tests.teacher.references import IMAGES, assert_close, build_reference
from tests.teacher.test_families import FAMILIES, ROTARY, batch

OWN = [name for name in FAMILIES if name not in ("vit_small_patch14_dinov2", "eva_giant_patch14_224")]
OWN.remove("vit_base_patch16_clip_224")


@cache
def build_family(name: str) -> Reference:
    return timm_reference(name, "timm")


def student_of(name: str, **kwargs) -> MaskedViT:
    return build_student(name, SHAPE, generator=torch.Generator().manual_seed(0), **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_is_timms_network_without_its_registers(name):
    student, reference = student_of(name), build_family(name)
    assert student.state_dict().keys() == reference.tensors.keys()
    student.load_state_dict(reference.tensors, strict=True)
    everything = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        tokens, tapped = student(patchify(IMAGES, 8), everything, taps=[TAP])
        expected = reference.model.forward_features(IMAGES)
        masked = student(batch().visible, IDS, taps=[TAP])[1]
    prefix, num_cls = reference.num_prefix, int(reference.has_cls)
    assert (student.num_prefix, student.num_cls) == (prefix, num_cls)
    assert_close(tokens, torch.cat([expected[:, :num_cls], expected[:, prefix:]], dim=1))
    assert_close(tapped[TAP], reference.features(IMAGES, None))
    assert_close(masked[TAP], reference.features(IMAGES, IDS))


@pytest.mark.parametrize("name", FAMILIES)
def test_initial_weights_are_the_families(name):
    """Tokens and learned positions are small, layer scale is timm's, nothing is left undrawn."""
    student, again = student_of(name), student_of(name)
    fresh = timm.create_model(name, num_classes=0, **SHAPE)
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values())
    for key, tensor in student.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
        if key.endswith(("gamma", "gamma_1", "gamma_2")) and name in OWN:
            assert torch.equal(tensor, fresh.state_dict()[key]), key
        elif key.endswith(("cls_token", "reg_token")) or (key == "pos_embed" and name in OWN):
            assert 0.01 < tensor.std() < 0.03, key
        elif key.endswith("bias"):
            assert not tensor.any(), key
    trained = dict(student.named_parameters())
    assert ("pos_embed" in trained) == (name in OWN and student.pos_embed is not None)
    assert not any(key.startswith(("attn_pool", "fc_norm")) for key in trained)
    for key, buffer in fresh.named_buffers():  # EVA's key bias
        if key.endswith("k_bias"):
            assert torch.equal(student.get_buffer(key), buffer)
    if name in ROTARY:
        with_angles = MaskedViT(fresh).rope
        assert torch.equal(student.rope, with_angles) and "rope" not in student.state_dict()


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_of_a_student_gets_a_gradient_with_dropped_patches(name, checkpoint_blocks):
    """Without one, AdamW and ZeRO would treat it differently from stage to stage."""
    decoder = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    config = config_for({"name": "dmae", "decoder": decoder}, teacher=True)
    numbers = {"name": name, "checkpoint_blocks": checkpoint_blocks, "embed_dim": 16}
    student = config.student.model_copy(update=numbers)
    objective, _ = build_objective(config.model_copy(update={"student": student}))
    prepared = objective.prepare(make_batch(3), torch.nn.Identity())
    prepared.visible, prepared.masked = prepared.visible / 255, prepared.masked / 255
    features = {tap: torch.randn(3, 1 + objective.num_visible, 12) for tap in objective.taps}
    objective(prepared, features)["loss"].backward()
    missing = [key for key, parameter in objective.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters())
    assert 0 < objective.gradient_shares()["share/3"] < 1


@pytest.mark.parametrize(
    "objective, name, words",
    [
        ({"name": "dino"}, "vit_base_patch16_siglip_224", ["dino", "CLS"]),
        ({"name": "mocov3"}, "vit_base_patch16_siglip_224", ["mocov3", "CLS"]),
        ({"name": "dino", "local_size": 8}, "vit_small_patch16_dinov3", ["local_crops"]),
        ({"name": "g2sd_specific"}, "vit_small_patch16_dinov3", ["g2sd_specific", "plain"]),
        ({"name": "mae"}, "vit_small_patch16_rope_mixed_224", ["student.name", "rope_mixed"]),
    ],
)
def test_what_a_family_lacks_is_refused(objective, name, words):
    teacher = objective["name"] == "g2sd_specific"
    config = config_for(objective, teacher=teacher)
    student = config.student.model_copy(update={"name": name})
    with refused(*words):
        build_objective(config.model_copy(update={"student": student}), num_classes=3)
    assert TEACHER["name"] != name


@pytest.mark.parametrize(
    "what", ["timm-registers", "dinov2-registers", "dinov3-gated", "dinov3-qkvb", "hf-dinov3", "dmae_ds"]
)
def test_a_student_continues_from_a_released_file(tmp_path, what):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    student = build_student(reference.name, reference.overrides, generator=torch.Generator())
    notes = fill_student(student, str(path), ModelConfig(name=reference.name, **reference.overrides))
    with torch.no_grad():
        assert_close(student(batch().visible, IDS, taps=[TAP])[1][TAP], reference.features(IMAGES, IDS))
    assert notes == ""
    if what == "timm-registers":  # positions of patches alone, interpolated for a larger image
        larger = {**SHAPE, "img_size": 48}
        student = build_student(reference.name, larger, generator=torch.Generator())
        notes = fill_student(student, str(path), ModelConfig(name=reference.name, **larger))
        assert student.pos_embed.shape == (1, 36, 32) and "4x4 -> 6x6" in notes
    other = ModelConfig(name="vit_small_patch16_dinov3", **SHAPE)
    wrong = build_student(other.name, SHAPE, generator=torch.Generator())
    if "dinov3" not in what:
        with refused("student.weights", path):
            fill_student(wrong, str(path), other)
