"""Average precision on a case that is computed by hand, and on odd sets of images."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dmae_ds.data.dense import DenseSample
from dmae_ds.dense.average_precision import SCORES, AveragePrecision
from tests.messages import refused

SIZE = (40, 50)


def mask_of(left, top, right, bottom, extra=0):
    """A mask of whole pixels, and `extra` pixels of the row below it."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    mask[bottom, left : left + extra] = True
    return mask


def sample(*objects):
    """objects: (box, label, crowd)"""
    return DenseSample(
        key="0",
        image=torch.zeros(3, *SIZE, dtype=torch.uint8),
        boxes=torch.tensor([box for box, *_ in objects], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        masks=torch.stack([mask_of(*box) for box, *_ in objects])
        if objects
        else torch.zeros(0, *SIZE, dtype=torch.bool),
        crowd=torch.tensor([crowd for *_, crowd in objects], dtype=torch.bool),
    )


def detected(*objects):
    """objects: (box, mask, label from 1, score)"""
    return {
        "boxes": torch.tensor([box for box, *_ in objects], dtype=torch.float32).reshape(-1, 4),
        "masks": torch.stack([0.9 * mask[None].float() for _, mask, *_ in objects])
        if objects
        else torch.zeros(0, 1, *SIZE),
        "labels": torch.tensor([label for *_, label, _ in objects], dtype=torch.int64),
        "scores": torch.tensor([score for *_, score in objects], dtype=torch.float32),
    }


A, B, CROWD, INSIDE = (2, 2, 12, 12), (20, 20, 30, 30), (0, 0, 50, 30), (10, 10, 20, 20)


def found(box, score, label=1):
    return box, mask_of(*box), label, score


def by_hand(order=(0, 1, 2, 3)):
    """Two classes of which one is never found, a crowd, an image without a box, an empty prediction."""
    images = {
        # A is found exactly; of B, 62 of 100 pixels
        0: (
            sample((A, 0, False), (B, 0, False)),
            detected(found(A, 0.9), ((20, 20, 30, 26.2), mask_of(20, 20, 30, 26, extra=2), 1, 0.7)),
        ),
        1: (sample(), detected(found(A, 0.8))),  # no box: what is found is wrong
        2: (sample((CROWD, 0, True)), detected(found(INSIDE, 0.95))),  # neither right nor wrong
        3: (sample((A, 1, False)), detected()),  # the second class
    }
    scores = AveragePrecision(num_classes=3)
    for image in order:
        scores.add(image, *images[image])
    return scores


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_the_scores_are_those_computed_by_hand(order):
    # Right, wrong, right where B counts (.5, .55, .6): precision 1 up to recall .5, then 2/3 (101 recalls)
    # Right, wrong, wrong elsewhere. The second class has 0, the third no box.
    with_b, without_b = (51 + 50 * 2 / 3) / 101, 51 / 101
    expected = {"ap": (3 * with_b + 7 * without_b) / 10, "ap50": with_b, "ap75": without_b}
    scores = by_hand(order).scores()
    assert list(scores) == SCORES
    for kind in ("box", "mask"):
        for name, value in expected.items():
            assert scores[f"{kind}_{name}"] == pytest.approx(100 * value / 2, abs=1e-6), (kind, name)


def test_without_any_detection_the_scores_are_zero():
    scores = AveragePrecision(num_classes=1)
    scores.add(0, sample((A, 0, False)), detected())
    assert scores.scores() == dict.fromkeys(SCORES, 0.0)


def test_masks_are_judged_apart_from_boxes():
    scores = AveragePrecision(num_classes=1)
    scores.add(0, sample((A, 0, False)), detected((A, mask_of(*B), 1, 0.5)))
    values = scores.scores()
    assert values["box_ap"] == pytest.approx(100) and values["mask_ap"] == 0


@pytest.mark.parametrize("objects", [[], [(CROWD, 0, True)]], ids=["no box", "crowds alone"])
def test_a_set_without_boxes_has_no_average_precision(objects):
    scores = AveragePrecision(num_classes=1)
    scores.add(0, sample(*objects), detected(found(INSIDE, 0.5)))
    with refused("data.val", 1, "box"):
        scores.scores()


def test_without_pycocotools_one_line_says_what_to_install(monkeypatch):
    plain = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pycocotools" else plain(name, *rest)
    )
    with refused("pycocotools", "dmae-ds[dense]"):
        AveragePrecision(num_classes=1)
