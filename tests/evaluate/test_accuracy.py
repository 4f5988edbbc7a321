"""Top-1 and top-5 by hand, over batches of unequal size and over two processes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dmae_ds.data.batch import Batch
from dmae_ds.evaluate.accuracy import measure_accuracy
from dmae_ds.models.patches import Normalize

NORMALIZE = Normalize((0.0,) * 3, (1.0,) * 3)


class Ranked(nn.Module):
    """Prefers classes in the order r, r + 1, ..., where 255 r / 51 is the image's red; only in eval mode."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        first = (images[:, 0, 0, 0] * 5).round().long()
        place = (torch.arange(self.num_classes) - first[:, None]) % self.num_classes
        return -place.float() * (-1 if self.training else 1)


def batches(*rows):
    """Rows are [(r, label), ...], one batch each."""
    for row in rows:
        images = torch.zeros(len(row), 3, 2, 2, dtype=torch.uint8)
        images[:, 0] = 51 * torch.tensor([first for first, _ in row])[:, None, None]
        labels = torch.tensor([label for _, label in row])
        yield Batch(images, None, labels, labels, labels)


def processes(*others):
    """This process, and the counts of others."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        autocast=nullcontext,
        reduce=lambda counts: counts + sum(torch.tensor(other, dtype=torch.float64) for other in others),
    )


def measure(num_classes, *rows, others=()):
    network = Ranked(num_classes).train()
    return measure_accuracy(
        network,
        batches(*rows),
        normalize=NORMALIZE,
        num_classes=num_classes,
        processes=processes(*others),
    )


@pytest.mark.parametrize(
    ("num_classes", "rows", "top1", "top5"),
    [
        # first, fifth, sixth and last
        (8, [[(0, 0), (0, 4), (0, 5)], [(1, 0)]], 25.0, 50.0),
        (6, [[(0, 0), (0, 5), (2, 0)]], 100 / 3, 200 / 3),
        (5, [[(0, 0), (0, 4)]], 50.0, None),  # five of five say nothing
        (2, [[(1, 1), (1, 0), (0, 0)], [(0, 1)]], 50.0, None),
    ],
)
def test_shares_of_images_by_hand(num_classes, rows, top1, top5):
    assert measure(num_classes, *rows) == pytest.approx((top1, top5))


def test_images_of_all_processes_count_alike():
    rows = [[(0, 0), (0, 4), (0, 5)], [(1, 0)]]
    assert measure(8, *rows, others=[(3, 3, 4)]) == pytest.approx((50.0, 62.5))
    assert measure(8, others=[(1, 2, 4)]) == pytest.approx((25.0, 50.0))  # none of its own
