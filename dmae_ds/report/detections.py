"""What the detectors of a run's folder find in a few validation images, next to what is annotated there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from dmae_ds.config.detection import DetectConfig
from dmae_ds.config.load import load_config
from dmae_ds.data.dense import DenseSample, open_dense
from dmae_ds.data.storage import Access
from dmae_ds.dense.detect_task import pixels_of
from dmae_ds.dense.detector import Detector
from dmae_ds.dense.detector_file import load_detector
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.report.boards import Board

NUM_SHOWN = 6
MIN_SCORE = 0.5  # of a detection that is drawn
SIDE = 256  # px; smaller images are enlarged to it, so that lines and names can be read
FILE = "last.safetensors"  # the one whose scores are in results.jsonl


def find_detectors(run: Path) -> list[Path]:
    """Folders below a run that hold a finished or running `eval detect`, by name."""
    return sorted(path.parent for path in run.glob(f"*/{FILE}") if _is_detector(path))


def show_detections(folders: list[Path]) -> Board:
    """A board of validation images: as they are, annotated, and a row for what each detector found.

    Raises UserError where shards or files can't be read.
    """
    images, rows = _choose(folders[0]), []
    for folder in folders:
        detector, facts = load_detector(folder / FILE, label="the report's detector")
        if not rows:
            rows = [
                ("image", [_drawn(sample, facts.classes, {}) for sample in images]),
                ("annotated", [_drawn(sample, facts.classes, _annotated(sample)) for sample in images]),
            ]
        label = "found" if len(folders) == 1 else f"found, {folder.name}"
        found = [_drawn(sample, facts.classes, _detected(detector, sample)) for sample in images]
        rows.append((label, found))
    return Board(rows)


def _is_detector(path: Path) -> bool:
    header = read_header(path)
    return header is not None and "detector" in header.metadata


def _choose(folder: Path) -> list[DenseSample]:
    """The same images for every report: the first of data.val that have a box, or the first ones."""
    config = load_config(str(folder / "config.yaml"), [], schema=DetectConfig, kind="evaluation recipe")
    val = open_dense(config.data.val, label="data.val", access=Access.of(config.data), maps=False)
    looked_at = [val[number] for number in range(min(len(val), 4 * NUM_SHOWN))]
    with_box = [sample for sample in looked_at if len(sample.boxes)]
    return (with_box or looked_at)[:NUM_SHOWN]


def _annotated(sample: DenseSample) -> dict[str, Tensor]:
    kept = ~sample.crowd
    return {"boxes": sample.boxes[kept], "labels": sample.labels[kept], "masks": sample.masks[kept]}


@torch.inference_mode()
def _detected(detector: Detector, sample: DenseSample) -> dict[str, Tensor]:
    (found,) = detector([pixels_of(sample)])
    kept = found["scores"] >= MIN_SCORE
    return {
        "boxes": found["boxes"][kept],
        "labels": found["labels"][kept] - 1,
        "masks": found["masks"][kept, 0] > 0.5,
    }


def _drawn(sample: DenseSample, classes: list[str], objects: dict[str, Tensor]) -> np.ndarray:
    """The image with its objects, [H, W, 3] uint8, on a square with the image in its upper left corner."""
    factor = max(1, math.ceil(SIDE / max(sample.image.shape[1:])))
    image = _enlarged(sample.image, factor)
    if objects and len(objects["boxes"]):
        labels = objects["labels"].tolist()
        colours = [_colour(label, len(classes)) for label in labels]
        masks = _enlarged(objects["masks"], factor)
        image = draw_segmentation_masks(image, masks, alpha=0.45, colors=colours)
        names = [classes[label] for label in labels]
        image = draw_bounding_boxes(image, objects["boxes"] * factor, names, colors=colours, width=2)
    side = max(image.shape[1:])
    image = F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]))
    return image.permute(1, 2, 0).numpy()


def _enlarged(pixels: Tensor, factor: int) -> Tensor:
    return pixels.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _colour(label: int, num_classes: int) -> str:
    """A colour of its own for every class."""
    return f"hsl({360 * label / max(1, num_classes):.0f}, 90%, 60%)"
