"""Taps of a teacher's output and relations, compared with timm's own modules, in every family."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.masking import PatchBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.teacher.build import build_frozen_teacher
from tests.messages import refused
from tests.teacher.reference import IDS, SHAPE, Reference, timm_reference
from tests.teacher.references import IMAGES, assert_close

# {a timm name: the taps of its output}; one network of each kind that differs above the blocks.
OUTPUTS = {
    "vit_small_patch14_reg4_dinov2": ("tokens", "cls"),
    "vit_small_patch16_dinov3": ("tokens", "cls"),
    "eva02_tiny_patch14_224": ("tokens", "cls"),  # its norm comes after the pooling
    "vit_base_patch16_clip_224": ("tokens", "cls"),
    "vit_base_patch16_siglip_224": ("tokens", "pooled"),
    "vit_pe_core_tiny_patch16_384": ("tokens", "cls", "pooled"),
    "tests.teacher.reference:pooling_vit": ("tokens", "cls", "pooled"),
}


@cache
def family(name: str) -> Reference:
    return timm_reference(name, "timm")


def build(name: str, folder, *taps: str, **options):
    reference = family(name)
    config = TeacherConfig(
        name=name, weights=str(reference.save(folder, reference.tensors)), **SHAPE, **options
    )
    return build_frozen_teacher(
        config, taps=taps, whole_blocks=3, mean=(0.5,) * 3, std=(0.5,) * 3, device=torch.device("cpu")
    )


def batch(ids: Tensor | None) -> PatchBatch:
    """The images with these patches visible, the others in order; None: all visible."""
    patches, ids = patchify(IMAGES, 8), torch.arange(16).expand(2, -1) if ids is None else ids
    others = torch.stack([torch.tensor([i for i in range(16) if i not in keep.tolist()]) for keep in ids])
    others = others.long()
    return PatchBatch(gather_patches(patches, ids), gather_patches(patches, others), ids, others)


def own_output(model: nn.Module) -> dict[str, Tensor]:
    """What timm's own forward gives of IMAGES, registers left out."""
    with torch.no_grad():
        tokens = model.forward_features(IMAGES)
        pooled = model.forward_head(tokens, pre_logits=True)
    has_cls, prefix = model.cls_token is not None, model.num_prefix_tokens
    patches = tokens[:, prefix:]
    return {
        "tokens": torch.cat([tokens[:, :1], patches], dim=1) if has_cls else patches,
        "cls": tokens[:, 0],
        "pooled": pooled,
    }


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_timms_own(tmp_path, name):
    taps = OUTPUTS[name]
    expected = own_output(family(name).model)
    features = build(name, tmp_path, *taps).features(batch(None))
    assert tuple(features) == taps
    for tap in taps:
        assert_close(features[tap], expected[tap])
    # A teacher that sees all gives the student's patches; what is pooled is the whole image.
    seeing = build(name, tmp_path, *taps, sees="all").features(batch(IDS))
    has_cls = "cls" in taps
    for tap in {"cls", "pooled"} & set(taps):
        assert_close(seeing[tap], expected[tap])
    whole = expected["tokens"]
    kept = [torch.cat([one[:has_cls], one[has_cls:][keep]]) for one, keep in zip(whole, IDS, strict=True)]
    assert_close(seeing["tokens"], torch.stack(kept))


@pytest.mark.parametrize("name", [*OUTPUTS, "eva_giant_patch14_224"])
def test_relations_are_what_timms_attention_multiplies(tmp_path, monkeypatch, name):
    model, calls = family(name).model, []
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **kwargs):
        calls.append(torch.stack([query, key, value], dim=1))
        return attention(query, key, value, **kwargs)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
        model.forward_features(IMAGES)
    teacher = build(name, tmp_path, "relation/2", "block/1", "relation/1", sees="all")
    assert teacher.vit.depth == 2
    seeing = teacher.features(batch(IDS))
    assert list(seeing) == ["relation/2", "block/1", "relation/1"]
    prefix, has_cls = model.num_prefix_tokens, model.cls_token is not None
    for tap, whole in (("relation/1", calls[0]), ("relation/2", calls[1])):
        rows = [[0] * has_cls + [prefix + place for place in keep] for keep in IDS.tolist()]
        expected = torch.stack([one[:, :, row] for one, row in zip(whole, rows, strict=True)])
        assert seeing[tap].shape == (2, 3, 2, 4 + has_cls, 16)  # [N, 3, heads, 1 + K, d]
        assert_close(seeing[tap], expected)


def test_a_relation_alone_does_not_run_its_block(tmp_path):
    teacher = build("vit_small_patch16_dinov3", tmp_path, "relation/3")
    ran = []
    for number, block in enumerate(teacher.vit.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    teacher.features(batch(IDS))
    assert ran == [1, 2]


def test_a_superset_begins_with_the_students_patches(tmp_path):
    name, here = "vit_small_patch16_dinov3", batch(IDS)
    both = torch.cat([here.ids_keep, here.ids_masked[:, :6]], dim=1)
    taps = ("block/2", "relation/1", "tokens")
    features = build(name, tmp_path, *taps, sees="superset", mask_ratio=0.375).features(here)
    expected = build(name, tmp_path, *taps).features(batch(both))
    assert features["tokens"].shape == (2, 11, 32) and features["relation/1"].shape[3] == 11
    for tap in taps:
        assert torch.equal(features[tap], expected[tap])


@pytest.mark.parametrize(
    "name, tap, words",
    [
        ("vit_small_patch14_reg4_dinov2", "pooled", ["'pooled'", "tokens, cls"]),
        ("vit_base_patch16_siglip_224", "cls", ["'cls'", "tokens, pooled"]),
        ("vit_so150m_patch16_reg4_gap_256", "pooled", ["'pooled'"]),
    ],
)
def test_an_output_that_the_network_lacks_is_refused(tmp_path, name, tap, words):
    with refused("teacher.name", name, *words):
        build(name, tmp_path, tap)
