"""The ViT trunk: its maps are timm's, and windows are what loops over windows give."""

from __future__ import annotations

import pytest
import timm
import torch

from dmae_ds.dense.trunk import VitTrunk, partition, quarter_ends, run_in_windows, unpartition
from tests.messages import refused

PLAIN = "vit_tiny_patch16_224"
DIM, PATCH = 16, 4


def build_vit(name=PLAIN, **kwargs):
    torch.manual_seed(0)
    numbers = {"img_size": 24, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 2}
    vit = timm.create_model(name, num_classes=0, dynamic_img_size=True, **(numbers | kwargs))
    for parameter in vit.parameters():  # biases and norms that do something
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


@pytest.mark.parametrize("grid", [(3, 5), (4, 4)])
@pytest.mark.parametrize("window", [5, 14])
def test_one_window_over_the_grid_is_plain_attention_to_the_bit(grid, window):
    block = build_vit(drop_path_rate=0.5, init_values=0.7).blocks[2].train()
    tokens = torch.randn(3, grid[0] * grid[1], DIM)
    torch.manual_seed(5)
    expected = block(tokens)
    torch.manual_seed(5)
    assert torch.equal(run_in_windows(block, tokens, grid, window), expected)


@pytest.mark.parametrize("grid, window", [((4, 6), 2), ((5, 4), 3), ((3, 7), 4)])
def test_windows_equal_loops_also_where_the_grid_is_padded(grid, window):
    block = build_vit().blocks[0].double().requires_grad_(False)
    height, width = grid
    tokens = torch.randn(2, height * width, DIM, dtype=torch.float64)
    expected = torch.empty_like(tokens)
    rows, columns = min(window, height), min(window, width)
    for image in range(2):
        normed = block.norm1(tokens[image]).reshape(height, width, DIM)
        attended = torch.empty(height, width, DIM, dtype=torch.float64)
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                places = [(r, c) for r in range(top, top + rows) for c in range(left, left + columns)]
                inside = [r < height and c < width for r, c in places]
                zero = torch.zeros(DIM, dtype=torch.float64)
                seen = [normed[place] if is_in else zero for place, is_in in zip(places, inside, strict=True)]
                result = block.attn(torch.stack(seen)[None])[0]
                for place, is_in, token in zip(places, inside, result, strict=True):
                    if is_in:
                        attended[place] = token
        middle = tokens[image] + attended.reshape(-1, DIM)
        expected[image] = middle + block.mlp(block.norm2(middle))
    actual = run_in_windows(block, tokens, grid, window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_partition_is_undone():
    tokens = torch.randn(2, 5, 7, 3)
    windows, padded = partition(tokens, 3)
    assert windows.shape == (2 * 2 * 3, 9, 3) and padded == (6, 9)
    assert torch.equal(unpartition(windows, padded, (5, 7), 3), tokens)
    assert torch.equal(windows[1, 4], tokens[0, 1, 4])  # the second window's middle


@pytest.mark.parametrize(
    "name, size",
    [(PLAIN, (24, 24)), (PLAIN, (16, 32)), ("eva02_tiny_patch14_224", (16, 32))],
    ids=["its own size", "another size", "rotary positions"],
)
def test_without_windows_the_maps_are_timms(name, size):
    vit = build_vit(name).eval()
    images = torch.randn(2, 3, *size)
    expected = vit.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
    actual = VitTrunk(vit, [1, 3])(images)
    assert [features.shape for features in actual] == [(2, DIM, size[0] // PATCH, size[1] // PATCH)] * 2
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_windows_see_no_further_and_global_blocks_do():
    """A changed patch in a corner reaches the other corner only through the global block."""
    vit = build_vit().eval()
    images = torch.randn(1, 3, 24, 24)
    changed = images.clone()
    changed[..., :PATCH, :PATCH] += 1

    def reach(trunk):
        before, after = trunk(images)[0], trunk(changed)[0]
        return bool((before != after)[..., -1, -1].any())

    assert not reach(VitTrunk(vit, [3], window=3))
    assert reach(VitTrunk(vit, [3], window=3, global_blocks=[2]))


@pytest.mark.parametrize("window", [None, 3])
def test_every_trained_parameter_gets_a_gradient(window):
    vit = build_vit(reg_tokens=2, global_pool="map")
    trunk = VitTrunk(vit, [1, 2], window=window, global_blocks=[2])
    sum(features.square().sum() for features in trunk(torch.randn(1, 3, 16, 24))).backward()
    for name, parameter in vit.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    frozen = {name.split(".")[0] for name, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert frozen == {"norm", "attn_pool", "blocks"} | ({"cls_token", "reg_token"} if window else set())
    assert all(p.requires_grad for p in vit.blocks[:2].parameters())


def test_windows_require_timms_plain_block():
    vit = build_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock)
    with refused("ParallelScalingBlock", "detector.window=null"):
        VitTrunk(vit, [3], window=3)
    assert VitTrunk(vit, [3])(torch.randn(1, 3, 24, 24))[0].shape == (1, DIM, 6, 6)


def test_quarters_of_any_depth():
    assert [quarter_ends(depth) for depth in (12, 24, 4, 6, 2, 1)] == [
        [3, 6, 9, 12],
        [6, 12, 18, 24],
        [1, 2, 3, 4],
        [2, 3, 5, 6],
        [1, 2],
        [1],
    ]
