"""Both pyramids against slow references (loops, float64)."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.dense.pyramid import SCALES, FourMapPyramid, SimplePyramid
from tests.dense import loops

WIDTH, OUT, GRID = 8, 6, (4, 2)
SIZES = [(16, 8), (8, 4), (4, 2), (2, 1), (1, 1)]


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, WIDTH, *GRID, generator=generator, dtype=torch.float64) for _ in range(4)]


def built(cls):
    torch.manual_seed(0)
    pyramid = cls(WIDTH, OUT).double()
    for parameter in pyramid.parameters():  # norms and biases that do something
        torch.nn.init.normal_(parameter, std=0.5)
    return pyramid.requires_grad_(False)


def assert_same(pyramid, maps, expected_of_image):
    actual = pyramid(maps)
    assert list(actual) == ["0", "1", "2", "3", "pool"]
    assert [tuple(level.shape[2:]) for level in actual.values()] == SIZES
    for number in range(2):
        expected = expected_of_image([features[number] for features in maps])
        expected.append(expected[-1][:, ::2, ::2])
        for name, level in zip(actual, expected, strict=True):
            torch.testing.assert_close(actual[name][number], level, rtol=0, atol=1e-6, msg=name)


def test_the_simple_pyramid_equals_loops(maps):
    pyramid = built(SimplePyramid)

    def slow(of_image):
        result = []
        for scale, (layers, one, norm_one, three, norm_three) in zip(SCALES, pyramid.levels, strict=True):
            level = loops.rescaled(layers, scale, of_image[-1])
            level = loops.norm(norm_one, loops.conv(one, level))
            result.append(loops.norm(norm_three, loops.conv(three, level)))
        return result

    assert_same(pyramid, maps, slow)


def test_the_fpn_on_four_maps_equals_loops(maps):
    pyramid = built(FourMapPyramid)

    def slow(of_image):
        scaled = [
            loops.rescaled(layers, scale, features)
            for layers, scale, features in zip(pyramid.rescale, SCALES, of_image, strict=True)
        ]
        inner = [
            loops.conv(block[0], level) for block, level in zip(pyramid.fpn.inner_blocks, scaled, strict=True)
        ]
        for number in (2, 1, 0):
            above = inner[number + 1]
            inner[number] = inner[number] + above.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        return [
            loops.conv(block[0], level) for block, level in zip(pyramid.fpn.layer_blocks, inner, strict=True)
        ]

    assert_same(pyramid, maps, slow)
