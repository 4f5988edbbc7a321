"""Feature-richness distillation against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dmae_ds.dense.richness import (
    Adapters,
    objectness_loss,
    pyramid_loss,
    richness_masks,
    warmup_weight,
)
from tests.dense import loops

SIZES = [(4, 6), (2, 3), (1, 2)]
IMAGES, ANCHORS, WIDTH, TEACHER_WIDTH = 2, 3, 4, 5


def drawn(channels, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(IMAGES, channels, *size, generator=generator).double() * 2 for size in SIZES]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_both_terms_equal_loops():
    torch.manual_seed(0)
    adapters = Adapters(len(SIZES), WIDTH, TEACHER_WIDTH).double().requires_grad_(False)
    student, teacher = drawn(WIDTH, 1), drawn(TEACHER_WIDTH, 2)
    student_logits, teacher_logits = drawn(ANCHORS, 3), drawn(ANCHORS, 4)
    masks = richness_masks(teacher_logits)
    actual = {
        "pyramid": float(pyramid_loss(adapters(student), teacher, masks)),
        "objectness": float(objectness_loss(student_logits, teacher_logits, masks)),
    }
    expected = {"pyramid": 0.0, "objectness": 0.0}
    for level, (height, width) in enumerate(SIZES):
        rich, pyramid, objectness = 0.0, 0.0, 0.0
        for image in range(IMAGES):
            adapted = loops.conv(adapters[level], student[level][image])
            for row in range(height):
                for column in range(width):
                    place = (image, slice(None), row, column)
                    its = [sigmoid(value) for value in teacher_logits[level][place].tolist()]
                    mine = [sigmoid(value) for value in student_logits[level][place].tolist()]
                    rich += max(its)
                    for one, other in zip(adapted[:, row, column], teacher[level][place], strict=True):
                        pyramid += max(its) * float(other - one) ** 2
                    for p, q in zip(mine, its, strict=True):
                        objectness -= max(its) * (q * math.log(p) + (1 - q) * math.log(1 - p))
        expected["pyramid"] += pyramid / rich
        expected["objectness"] += objectness / rich
    for name, value in expected.items():
        assert math.isclose(actual[name], value, rel_tol=1e-6), (name, actual[name], value)


def test_logits_of_bfloat16_and_extremes_stay_finite():
    logits = [torch.tensor([[[[200.0]], [[-200.0]]]], dtype=torch.bfloat16)]
    masks = richness_masks(logits)
    assert masks[0].dtype == torch.float32 and float(masks[0]) == 1.0
    assert float(objectness_loss([-logits[0]], logits, masks)) == 400.0
    assert float(objectness_loss(logits, logits, masks)) == 0.0


def test_the_weight_rises_linearly_and_stays():
    weights = [float(warmup_weight(torch.tensor(step), 500)) for step in (0, 125, 499, 500, 9999)]
    assert weights == pytest.approx([0, 0.25, 0.998, 1, 1])
    assert warmup_weight(torch.tensor(0), 0) == 1
