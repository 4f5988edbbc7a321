"""Patches, masks and the encoder, compared with a slow loop, the published counts, and timm."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from dmae_ds.models.decoder import Decoder
from dmae_ds.models.masking import gather_patches, keep_random, num_visible
from dmae_ds.models.patches import Normalize, patchify, unpatchify
from dmae_ds.models.positions import sincos_positions
from dmae_ds.models.vit import MaskedViT, build_student, build_timm_vit
from tests.messages import refused

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def test_patchify_cuts_as_a_slow_loop_does_and_keeps_the_dtype():
    images = torch.arange(2 * 3 * 8 * 12, dtype=torch.int16).reshape(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.dtype == torch.int16
    for row in range(2):
        for column in range(3):
            expected = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(0, 2, 3, 1)
            assert torch.equal(patches[:, 3 * row + column], expected)
    assert torch.equal(unpatchify(patches, (2, 3)), images)


def test_normalize_is_the_usual_formula():
    pixels = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (pixels.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(Normalize(mean, std)(pixels).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "ratio, rounded, truncated", [(0.75, 49, 49), (0.90, 20, 19), (0.95, 10, 9), (0.98, 4, 3)]
)
def test_visible_patches_of_224_px_are_those_of_the_paper_and_the_code(ratio, rounded, truncated):
    assert num_visible(196, ratio, "round") == rounded
    assert num_visible(196, ratio, "int") == truncated


@pytest.mark.parametrize("ratio, count", [(0.999, "round"), (0.001, "round"), (0.99, "int")])
def test_a_mask_that_leaves_nothing_is_refused(ratio, count):
    with refused("objective.mask_ratio", ratio, 64, count):
        num_visible(64, ratio, count)


def test_every_patch_is_kept_or_masked_once_and_ties_go_by_position():
    noise = torch.tensor([[0.5, 0.5, 0.1, 0.5], [0.4, 0.3, 0.2, 0.1]])
    ids_keep, ids_masked = keep_random(noise, 2)
    assert ids_keep.tolist() == [[2, 0], [3, 2]]
    assert ids_masked.tolist() == [[1, 3], [1, 0]]


def test_a_student_with_every_patch_visible_is_timms_model():
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0)).eval()
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY).eval()
    reference.load_state_dict(student.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    patches, everything = patchify(images, 8), torch.arange(16).expand(2, -1)
    with torch.no_grad():
        tokens, tapped = student(patches, everything, taps=[1, 3])
        expected = reference.forward_features(images)
        _, intermediates = reference.forward_intermediates(
            images, indices=[0, 2], return_prefix_tokens=True, output_fmt="NLC"
        )
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    for block, (patch_tokens, cls) in zip((1, 3), intermediates, strict=True):
        torch.testing.assert_close(tapped[block], torch.cat([cls, patch_tokens], dim=1), rtol=1e-5, atol=1e-5)


def input_dtypes(blocks) -> list[torch.dtype]:
    """A list that gets the dtype of every block's input."""
    dtypes = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    return dtypes


def test_under_autocast_tokens_stay_float32_between_blocks_as_timms_do():
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0))
    decoder = Decoder(
        encoder_dim=32,
        patch_size=8,
        grid=(4, 4),
        depth=2,
        embed_dim=16,
        num_heads=2,
        generator=torch.Generator().manual_seed(1),
    )
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY)
    reference.load_state_dict(student.state_dict(), strict=True)
    networks = (student, reference, decoder)
    dtypes = [input_dtypes(network.blocks) for network in networks]
    images, everything = torch.randn(2, 3, 32, 32), torch.arange(16).expand(2, -1)
    visible, masked = everything[:, :4], everything[:, 4:]
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = student(patchify(images, 8), everything)
        expected = reference.forward_features(images)
        decoder(tokens[:, :5], visible, masked)
    assert dtypes == [[torch.float32] * len(network.blocks) for network in networks]
    torch.testing.assert_close(tokens, expected, rtol=1e-2, atol=2e-2)
    for network, found in zip((student, decoder), (dtypes[0], dtypes[2]), strict=True):
        network.bfloat16()
        found.clear()
    decoder(student(patchify(images, 8), everything)[0][:, :5], visible, masked)
    assert set(dtypes[0] + dtypes[2]) == {torch.bfloat16}


def test_a_kept_patch_keeps_its_own_position():
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0))
    patches = torch.randn(1, 16, 8, 8, 3)
    whole = student.embed(patches, torch.arange(16)[None])
    some = torch.tensor([[5, 0, 11]])
    torch.testing.assert_close(
        student.embed(gather_patches(patches, some), some)[:, 1:],
        whole[:, 1:][:, some[0]],
        rtol=1e-5,
        atol=1e-6,
    )


def test_trained_positions_get_their_gradient_in_a_fixed_order():
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0))
    positions = student.pos_embed
    del student.pos_embed
    student.pos_embed = torch.nn.Parameter(positions.clone())
    tokens = student.embed(torch.rand(4, 16, 8, 8, 3), torch.arange(16).expand(4, -1))
    names, rest = set(), [tokens.grad_fn]
    while rest:
        node = rest.pop()
        names.add(node.name())
        rest += [next_node for next_node, _ in node.next_functions if next_node is not None]
    assert "EmbeddingBackward0" in names
    assert "IndexBackward0" not in names  # adds with atomics, in the order in which threads come


def test_a_smaller_image_covers_the_extent_of_the_whole_grid():
    """A patch of the small grid covers several of the large one, and its position is the mean of theirs."""
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0))
    own = sincos_positions(student.embed_dim, student.grid)
    assert torch.equal(sincos_positions(student.embed_dim, student.grid, span=student.grid), own)
    small = sincos_positions(student.embed_dim, (2, 4), span=(4, 4))[0, 1:].view(2, 4, -1)
    frequencies = [10000 ** -(k / (student.embed_dim / 4)) for k in range(student.embed_dim // 4)]
    for row in range(2):
        for column in range(4):
            place = {"column": column, "row": (2 * row + 2 * row + 1) / 2}  # the middle of rows 2r and 2r + 1
            expected = [
                f(place[axis] * w)
                for axis in ("column", "row")
                for f in (math.sin, math.cos)
                for w in frequencies
            ]
            torch.testing.assert_close(small[row, column], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    patches, ids = torch.randn(3, 8, 8, 8, 3), torch.arange(8).expand(3, -1)
    tokens = student.embed(patches, ids, grid=(2, 4))
    torch.testing.assert_close(tokens[:, 1:], student.patch_embed.proj(patches) + small.flatten(0, 1))
    assert student(patches, ids, grid=(2, 4))[0].shape == (3, 9, student.embed_dim)
    assert torch.equal(student.embed(patches, ids, grid=student.grid), student.embed(patches, ids))


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.rand(seed + 3)  # the global generator's state differs
        return build_student(
            "vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(seed)
        ).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])


def test_gradients_at_a_tap_are_measured_apart():
    student = build_student("vit_tiny_patch16_224", TINY, generator=torch.Generator().manual_seed(0))
    tokens, tapped = student(torch.randn(1, 4, 8, 8, 3), torch.arange(4)[None], taps=[2])
    (tokens.sum() * 0 + 3 * tapped[2].sum()).backward()
    assert student.gradient_norms[2]["tap"].item() == pytest.approx(3 * tapped[2].numel() ** 0.5)
    assert student.gradient_norms[2]["trunk"].item() == 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("vit_bse_patch16_224", ["timm"]),
        ("resnet18", ["VisionTransformer", "Eva"]),
        ("my_lab:net", ["module:function"]),
    ],
)
def test_a_name_that_can_not_be_used_is_refused(name, words):
    with refused(f"student.name '{name}'", *words):
        build_timm_vit(name, {})


def test_numbers_that_do_not_fit_are_refused():
    with refused("student.img_size 33", "student.patch_size 8"):
        build_timm_vit("vit_tiny_patch16_224", {**TINY, "img_size": 33})
    with refused("student", "vit_tiny_patch16_224", "'num_heads': 5"):
        build_timm_vit("vit_tiny_patch16_224", {**TINY, "num_heads": 5})


def test_a_teacher_without_norm_holds_none():
    assert MaskedViT(build_timm_vit("vit_tiny_patch16_224", TINY), keep_norm=False).norm is None
