"""mIoU, mean and pixel accuracy compared with loops over pixels in float64, and their edges."""

import numpy as np
import pytest
import torch

from dmae_ds.evaluate.segmentation_scores import NO_CLASS, ConfusionMatrix, segmentation_scores
from tests.messages import refused


def by_loops(predicted, expected, num_classes):
    """The three scores in percent, pixel by pixel."""
    pixels = [(p, e) for p, e in zip(predicted.ravel(), expected.ravel(), strict=True) if e != NO_CLASS]
    ious, accuracies = [], []
    for which in range(num_classes):
        both = sum(p == which and e == which for p, e in pixels)
        either = sum(p == which or e == which for p, e in pixels)
        in_map = sum(e == which for _, e in pixels)
        ious += [both / either] if either else []
        accuracies += [both / in_map] if in_map else []
    return {
        "miou": 100 * sum(ious) / len(ious),
        "mean_accuracy": 100 * sum(accuracies) / len(accuracies),
        "pixel_accuracy": 100 * sum(p == e for p, e in pixels) / len(pixels),
    }


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_equals_loops_over_pixels(num_classes):
    rng = np.random.default_rng(num_classes)
    expected = rng.integers(0, num_classes, (3, 11, 7))
    predicted = np.where(rng.random(expected.shape) < 0.6, expected, rng.integers(0, num_classes, (3, 11, 7)))
    expected[rng.random(expected.shape) < 0.2] = NO_CLASS
    matrix = ConfusionMatrix(num_classes)
    for image, label_map in zip(predicted, expected, strict=True):
        matrix.add(torch.from_numpy(image), torch.from_numpy(label_map))
    assert matrix.scores() == pytest.approx(by_loops(predicted, expected, num_classes), abs=1e-9)
    assert matrix.counts.sum() == (expected != NO_CLASS).sum()


def test_a_class_that_maps_or_predictions_lack():
    # Class 2 is only predicted: its IoU is 0, it has no accuracy. Class 3 is nowhere, and counts nowhere.
    predicted, expected = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1])
    matrix = ConfusionMatrix(4)
    matrix.add(predicted, expected)
    assert matrix.scores() == pytest.approx(
        {"miou": 100 * (1 + 0.5 + 0) / 3, "mean_accuracy": 75, "pixel_accuracy": 75}
    )
    assert matrix.scores() == pytest.approx(by_loops(predicted.numpy(), expected.numpy(), 4))


def test_the_counts_of_all_processes_are_scored():
    class Doubled:
        num_processes, process_index = 2, 0

        def reduce(self, tensor):
            other = torch.tensor([[0, 4], [0, 0]])
            return tensor + other

    matrix = ConfusionMatrix(2)
    matrix.add(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    expected = segmentation_scores(torch.tensor([[2, 4], [0, 2]]))
    assert matrix.scores(Doubled()) == expected != matrix.scores()


def test_maps_without_any_class_and_unknown_classes_are_refused():
    matrix = ConfusionMatrix(3)
    matrix.add(torch.zeros(2, 2), torch.full((2, 2), NO_CLASS))
    with refused("no pixel"):
        matrix.scores()
    with refused("class 3", "0 to 2"):
        matrix.add(torch.zeros(2), torch.tensor([1, 3]))
    many = ConfusionMatrix(300, no_class=65535)  # 255 is a class
    many.add(torch.tensor([255, 1]), torch.tensor([255, 65535]))
    assert many.scores()["miou"] == 100 and many.counts[255, 255] == 1 == many.counts.sum()
