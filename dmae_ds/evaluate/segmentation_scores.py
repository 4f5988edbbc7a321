"""Scores of a segmentation from one confusion matrix: mIoU, mean and pixel accuracy over a whole set.

    matrix = ConfusionMatrix(num_classes, device=device)
    matrix.add(predicted, label_map)           # for each image or batch; class 255 is left out
    scores = matrix.scores(processes)          # {"miou": ..., "mean_accuracy": ..., "pixel_accuracy": ...}

The counts are of the whole set, not means over images, as for ADE20K and VOC.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.evaluate.logistic import ALONE

NO_CLASS = 255  # of a pixel in a label map that belongs to no class; `DenseSet.ignore_index` for any set


class ConfusionMatrix:
    """Counts of pixels [C, C] int64: rows are classes of the label map, columns predicted classes.

    no_class: value of a label map's pixels that do not count
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu", no_class: int = NO_CLASS):
        self.no_class = no_class
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, label_map: Tensor) -> None:
        """Count the pixels of one or several images.

        predicted, label_map: integers of one shape, on the matrix's device; pixels of `no_class` do not count
        Raises UserError for a class of the label map that is not among the classes.
        """
        assert predicted.shape == label_map.shape, f"{predicted.shape} and {label_map.shape} differ"
        num_classes, has_class = len(self.counts), label_map != self.no_class
        expected, predicted = label_map[has_class].long(), predicted[has_class].long()
        if expected.numel() and (expected.min() < 0 or expected.max() >= num_classes):
            wrong = expected[(expected < 0) | (expected >= num_classes)][0].item()
            raise UserError(
                f"a label map has class {wrong}, expected 0 to {num_classes - 1}, or {self.no_class} for no "
                "class; make the shards with all classes"
            )
        cells = torch.bincount(expected * num_classes + predicted, minlength=num_classes**2)
        self.counts += cells.view_as(self.counts)

    def scores(self, processes=ALONE) -> dict[str, float]:
        """The scores in percent of what all processes counted; see `segmentation_scores`. Collective."""
        return segmentation_scores(processes.reduce(self.counts))


def segmentation_scores(counts: Tensor) -> dict[str, float]:
    """Compute miou, mean_accuracy and pixel_accuracy in percent from a confusion matrix [C, C] int64.

    A class in neither label maps nor predictions has no IoU, and one that no label map has has no accuracy:
    the means leave them out. A class that is only predicted has an IoU of 0.
    Raises UserError where no pixel has a class.
    """
    counts = counts.double()
    right, in_maps, in_predictions = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    if not in_maps.any():
        raise UserError(
            "no pixel of the label maps has a class, so there is nothing to score; "
            "check the folder of masks that the shards were made from"
        )
    union = in_maps + in_predictions - right
    return {
        "miou": _percent((right / union)[union > 0]),
        "mean_accuracy": _percent((right / in_maps)[in_maps > 0]),
        "pixel_accuracy": _percent(right.sum() / in_maps.sum()),
    }


def _percent(shares: Tensor) -> float:
    return 100 * shares.mean().item()
