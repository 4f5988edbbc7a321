"""What the segmenters of a run's folder predict for a few validation images, next to their label maps."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dmae_ds.config.load import load_config
from dmae_ds.config.segmentation import SegmentConfig
from dmae_ds.data.dense import DenseSample, DenseSet, open_dense
from dmae_ds.data.storage import Access
from dmae_ds.dense.predict import Predictor
from dmae_ds.dense.segmenter_file import load_segmenter
from dmae_ds.models.patches import Normalize
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.report.boards import Board

NUM_SHOWN = 6
FILE = "last.safetensors"  # the one whose scores are in results.jsonl


def find_segmenters(run: Path) -> list[Path]:
    """Folders below a run that hold a finished or running `eval segment`, by name."""
    return sorted(path.parent for path in run.glob(f"*/{FILE}") if _is_segmenter(path))


def show_segmentations(folders: list[Path]) -> Board:
    """A board of validation images: as they are, label maps, and a row for what each segmenter predicts.

    Every class has one colour in all rows; what has no class is black.
    Raises UserError where shards or files can't be read.
    """
    val = _open_val(folders[0])
    samples = [val[number] for number in range(min(len(val), NUM_SHOWN))]
    rows = [
        ("image", [_on_square(sample.image) for sample in samples]),
        ("label map", [_in_colours(sample.label_map, len(val.map_classes)) for sample in samples]),
    ]
    for folder in folders:
        label = "predicted" if len(folders) == 1 else f"predicted, {folder.name}"
        rows.append((label, _predict(folder / FILE, samples)))
    return Board(rows)


def _is_segmenter(path: Path) -> bool:
    header = read_header(path)
    return header is not None and "segmenter" in header.metadata


def _open_val(folder: Path) -> DenseSet:
    config = load_config(str(folder / "config.yaml"), [], schema=SegmentConfig, kind="evaluation recipe")
    return open_dense(config.data.val, label="data.val", access=Access.of(config.data), boxes=False)


def _predict(path: Path, samples: list[DenseSample]) -> list[np.ndarray]:
    segmenter, facts = load_segmenter(path, label="the report's segmenter")
    predict, normalize = (
        Predictor(facts.short_side, facts.window, facts.stride),
        Normalize(facts.mean, facts.std),
    )
    maps = (predict(segmenter, sample.image, normalize) for sample in samples)
    return [_in_colours(one, len(facts.classes)) for one in maps]


def _in_colours(label_map: Tensor, num_classes: int) -> np.ndarray:
    """Colour the classes of a map [H, W] on a square, [S, S, 3] uint8; other values are black."""
    hues = (colorsys.hsv_to_rgb(number / num_classes, 0.8, 0.95) for number in range(num_classes))
    colours = torch.tensor([*hues, (0.0, 0.0, 0.0)]).mul(255).round().to(torch.uint8)  # [classes + 1, 3]
    known = torch.where(label_map < num_classes, label_map, num_classes)
    return _on_square(colours[known].permute(2, 0, 1))


def _on_square(pixels: Tensor) -> np.ndarray:
    """An image [3, H, W] in the upper left corner of a black square, [S, S, 3]."""
    height, width = pixels.shape[1:]
    side = max(height, width)
    return F.pad(pixels, (0, side - width, 0, side - height)).permute(1, 2, 0).numpy()
