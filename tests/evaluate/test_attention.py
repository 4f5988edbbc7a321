"""Attention maps are the weights that the network uses, and the chosen heads depend on the image."""

import pytest
import timm
import torch

from dmae_ds.evaluate.attention import attention_weights, choose_heads, cls_attention
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT, build_student
from tests.messages import refused

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def rotary():
    """A network like DINOv3's: rotary positions, registers, no positional embedding."""
    return timm.create_model(
        "vit_small_patch16_dinov3",
        num_classes=0,
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=3,
    ).eval()


@pytest.fixture
def student():
    return build_student("vit_tiny_patch16_224", SHAPE, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def patches():
    return patchify(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), 4)


def test_rows_sum_to_one_and_give_the_fused_output_from_the_values(student):
    attention = student.blocks[1].attn
    with torch.no_grad():
        attention.qkv.weight.mul_(4)  # peaked maps, which an average would not explain
        tokens = torch.randn(4, 17, 24, generator=torch.Generator().manual_seed(2))
        fused = attention(tokens)
        with attention_weights(attention) as weights:
            attention(tokens)
        (weights,) = weights
        # [N, T, 3 * D] -> values [N, heads, T, D / heads], the last third
        values = attention.qkv(tokens)[..., 48:].unflatten(-1, (3, 8)).transpose(1, 2)
        by_hand = attention.proj((weights @ values).transpose(1, 2).flatten(2))
    assert weights.shape == (4, 3, 17, 17) and (weights >= 0).all() and weights.max() > 0.5
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 3, 17))
    torch.testing.assert_close(by_hand, fused, rtol=1e-4, atol=1e-5)


def test_reading_the_weights_leaves_the_network_unchanged(student, patches):
    ids = torch.arange(16).expand(4, -1)
    before = student(patches, ids)[0]
    fused = student.blocks[1].attn.fused_attn
    maps = cls_attention(student, patches, 2)
    assert student.blocks[1].attn.fused_attn == fused and not student.blocks[1].attn.attn_drop._forward_hooks
    assert torch.equal(student(patches, ids)[0], before)
    assert maps.shape == (4, 3, 16)
    rest = 1 - maps.sum(dim=-1)  # the attention of CLS to itself
    assert (rest > 0).all() and (rest < 1).all()


def test_maps_belong_to_the_requested_block(student, patches):
    assert not torch.allclose(cls_attention(student, patches, 1), cls_attention(student, patches, 2))


def test_maps_include_rotary_positions_and_leave_registers_out(patches):
    vit = MaskedViT(rotary())
    assert vit.rope is not None and vit.num_prefix == 5
    maps = cls_attention(vit, patches, 2)
    assert maps.shape == (4, 3, 16) and (maps.sum(dim=-1) < 1).all()
    with attention_weights(vit.blocks[1].attn) as weights:
        vit(patches, torch.arange(16).expand(4, -1))
    assert torch.equal(maps, weights[0][:, :, 0, 5:])  # CLS and four registers come first
    vit.rope = vit.rope.flip(0)
    assert not torch.allclose(cls_attention(vit, patches, 2), maps)


def test_a_network_without_cls_is_refused(patches):
    vit = MaskedViT(timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **SHAPE))
    with refused("CLS", error=ValueError):
        cls_attention(vit, patches, 1)


def test_a_head_that_follows_the_image_comes_before_one_that_always_attends_to_one_place_or_everywhere():
    follows, fixed, everywhere = torch.eye(3, 6), torch.eye(1, 6).expand(3, 6), torch.full((3, 6), 1 / 6)
    weakly = 0.5 * follows + 0.5 / 6
    maps = torch.stack([fixed, weakly, everywhere, follows], dim=1)  # [3 images, 4 heads, 6]
    assert choose_heads(maps, 2) == [3, 1]
    assert choose_heads(0.01 * maps, 2) == [3, 1]  # the attention of CLS to itself does not matter
    assert len(choose_heads(maps, 9)) == 4
