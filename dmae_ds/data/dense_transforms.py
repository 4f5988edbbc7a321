"""What training sees of an image with its map, boxes and masks: scale jitter, crop, flip, colours.

    view = SegmentationView(size=512, seed=0)
    sample = view(dense[number], epoch=3)

Image, map, boxes and masks move together, by torchvision's v2 functions on tv_tensors. Every number is drawn
from (seed, epoch, key), as in transforms.py, and never from torch's global generator: a sample looks the same
on any rank, in any worker, in any order and after any resume. Maps and masks are resized by the nearest pixel
centre (v2 alone would take the corner's, half a pixel off the image), and padded as no class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dmae_ds.data.dense import DenseSample
from dmae_ds.data.transforms import sample_rng

DENSE_STREAM, DENSE_PHOTOMETRIC_STREAM = 5, 6  # after those of transforms.py
NUM_CROP_TRIES = 10  # mmseg's, against crops of one class
FILL = (124, 116, 104)  # padding of images: ImageNet's mean, which is about 0 once normalised
MIN_SIDE = 1e-3  # px; what is left of a box below it is dropped
# torchvision's RandomPhotometricDistort (SSD's): factors of each change, and the probability of each
BRIGHTNESS, CONTRAST, SATURATION, HUE, CHANGE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05), 0.5


@dataclass(frozen=True)
class SegmentationView:
    """Scale jitter, a square crop, flip and colours: MAE's setting for segmentation (mmseg's)."""

    size: int  # side of the crop, px
    short_side: int | None = None  # of the image before the jitter; None: size
    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75  # crops in which a class has more are drawn again
    flip: bool = True
    photometric: bool = True
    seed: int = 0
    ignore_index: int = 255  # DenseSet.ignore_index
    fill: tuple[int, int, int] = FILL

    def __call__(self, sample: DenseSample, *, epoch: int) -> DenseSample:
        """Draw the view of a sample: all of it [size, size], padded on the right and below."""
        rng = sample_rng(self.seed, epoch, int(sample.key), DENSE_STREAM)
        factor, flip, places = rng.uniform(*self.scale), rng.random() < 0.5, rng.random((NUM_CROP_TRIES, 2))
        short_side = self.short_side or self.size
        height, width = fit_size(*sample.image.shape[1:], short_side * factor, 4 * short_side * factor)
        sample = resize(sample, height=height, width=width)
        for place in places:
            top, left = _crop_place(height, width, self.size, place)
            if self._is_mixed(sample, top, left):
                break
        sample = crop(sample, top=top, left=left, height=self.size, width=self.size)
        sample = pad(
            sample, height=self.size, width=self.size, ignore_index=self.ignore_index, fill=self.fill
        )
        sample = hflip(sample) if flip and self.flip else sample
        if self.photometric:
            colours = sample_rng(self.seed, epoch, int(sample.key), DENSE_PHOTOMETRIC_STREAM)
            sample = sample._replace(image=change_colours(sample.image, colours))
        return sample

    def _is_mixed(self, sample: DenseSample, top: int, left: int) -> bool:
        """Whether no class has more than `max_class_share` of a crop; true without a map."""
        if sample.label_map is None or self.max_class_share >= 1:
            return True
        window = sample.label_map[top : top + self.size, left : left + self.size]
        counts = torch.bincount(window[window != self.ignore_index])
        return bool((counts > 0).sum() > 1 and counts.max() < self.max_class_share * counts.sum())


@dataclass(frozen=True)
class LargeScaleJitter:
    """Scale jitter of a square, crop or padding to it, and flip: ViTDet's setting for detection."""

    size: int  # px
    scale: tuple[float, float] = (0.1, 2.0)
    flip: bool = True
    seed: int = 0
    ignore_index: int = 255
    fill: tuple[int, int, int] = FILL

    def __call__(self, sample: DenseSample, *, epoch: int) -> DenseSample:
        """Draw the view of a sample: all of it [size, size], padded on the right and below."""
        rng = sample_rng(self.seed, epoch, int(sample.key), DENSE_STREAM)
        side, flip, place = self.size * rng.uniform(*self.scale), rng.random() < 0.5, rng.random(2)
        height, width = fit_size(*sample.image.shape[1:], side, side)
        sample = resize(sample, height=height, width=width)
        top, left = _crop_place(height, width, self.size, place)
        sample = crop(sample, top=top, left=left, height=self.size, width=self.size)
        sample = hflip(sample) if flip and self.flip else sample
        return pad(sample, height=self.size, width=self.size, ignore_index=self.ignore_index, fill=self.fill)


@dataclass(frozen=True)
class ShortestEdge:
    """Resizing to one of several short sides, within a long side, and flip: the 1x setting of Mask R-CNN."""

    short_sides: tuple[int, ...] = (800,)
    long_side: int = 1333
    flip: bool = True
    seed: int = 0

    def __call__(self, sample: DenseSample, *, epoch: int) -> DenseSample:
        """Draw the view of a sample, the whole image."""
        rng = sample_rng(self.seed, epoch, int(sample.key), DENSE_STREAM)
        short_side, flip = self.short_sides[rng.integers(len(self.short_sides))], rng.random() < 0.5
        height, width = fit_size(*sample.image.shape[1:], short_side, self.long_side)
        sample = resize(sample, height=height, width=width)
        return hflip(sample) if flip and self.flip else sample


def fit_size(height: int, width: int, short_side: float, long_side: float) -> tuple[int, int]:
    """Height and width of the largest image of this shape within both sides, at least 1 px."""
    factor = min(short_side / min(height, width), long_side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize(sample: DenseSample, *, height: int, width: int) -> DenseSample:
    """Resize everything: the image bilinear and antialiased, maps and masks by the nearest pixel centre."""

    def nearest(mask: torch.Tensor) -> torch.Tensor:
        return F.resize_image(mask, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)

    if sample.image.shape[1:] == (height, width):
        return sample
    label_map, masks = sample.label_map, sample.masks
    rest = sample._replace(label_map=None, masks=None)
    if height == width == 1:  # torch 2.14 fails at it with uint8
        rest = rest._replace(image=rest.image.float())
    moved = _move(rest, lambda it: F.resize(it, [height, width], antialias=True))
    if moved.image.is_floating_point():
        moved = moved._replace(image=moved.image.round().to(torch.uint8))
    if label_map is not None:
        label_map = nearest(label_map[None])[0]
    if masks is not None:
        empty = masks.new_zeros((0, height, width))
        masks = nearest(masks.to(torch.uint8)).bool() if len(masks) else empty
    return _drop_vanished(moved._replace(label_map=label_map, masks=masks))


def crop(sample: DenseSample, *, top: int, left: int, height: int, width: int) -> DenseSample:
    """Cut a window out, at most to the image's edge.

    Boxes are cut to it; those with a mask then enclose what is left of it. Objects of which nothing is left
    are dropped with their masks and labels.
    """
    height, width = min(height, sample.image.shape[1] - top), min(width, sample.image.shape[2] - left)
    cropped = _move(sample, lambda it: F.crop(it, top, left, height, width))
    if cropped.boxes is not None and cropped.masks is not None:
        is_cut = (_sides(cropped.boxes) < _sides(sample.boxes) - 1e-3).any(1)
        enclosing = _enclose(cropped.masks, cropped.boxes)
        cropped = cropped._replace(boxes=torch.where(is_cut[:, None], enclosing, cropped.boxes))
    return _drop_vanished(cropped)


def pad(
    sample: DenseSample, *, height: int, width: int, ignore_index: int, fill: tuple[int, int, int] = FILL
) -> DenseSample:
    """Pad to at least this size on the right and below: images by `fill`, maps by no class."""
    right, below = max(0, width - sample.image.shape[2]), max(0, height - sample.image.shape[1])
    if not right and not below:
        return sample

    def pad_one(it: Any) -> Any:
        value = 0
        if isinstance(it, tv_tensors.Image):
            value = [float(channel) for channel in fill]
        elif isinstance(it, tv_tensors.Mask) and it.dtype == torch.int64:
            value = ignore_index
        return F.pad(it, [0, 0, right, below], fill=value)

    return _move(sample, pad_one)


def hflip(sample: DenseSample) -> DenseSample:
    """Mirror everything."""
    return _move(sample, F.horizontal_flip)


def change_colours(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue of uint8 [3, H, W], each half of the time."""
    # Everything is drawn, used or not, so that one change does not shift the draws of the next.
    is_used, contrast_first = rng.random(4) < CHANGE, rng.random() < 0.5
    brightness, contrast, saturation, hue = (
        rng.uniform(*bounds) for bounds in (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    )
    changes = [
        (is_used[0], F.adjust_brightness, brightness),
        (is_used[1] and contrast_first, F.adjust_contrast, contrast),
        (is_used[2], F.adjust_saturation, saturation),
        (is_used[3], F.adjust_hue, hue),
        (is_used[1] and not contrast_first, F.adjust_contrast, contrast),
    ]
    for used, change, factor in changes:
        if used:
            image = change(image, factor)
    return image


def _crop_place(height: int, width: int, size: int, place: np.ndarray) -> tuple[int, int]:
    """Top and left of a square window, from two draws in [0, 1)."""
    free = max(0, height - size) + 1, max(0, width - size) + 1
    return int(place[0] * free[0]), int(place[1] * free[1])


def _move(sample: DenseSample, function: Callable[[Any], Any]) -> DenseSample:
    """Apply one of v2's functions to everything in a sample, as tv_tensors; boxes are cut to the image."""
    canvas = tuple(sample.image.shape[1:])
    wrapped = {
        "image": tv_tensors.Image(sample.image),
        "label_map": None if sample.label_map is None else tv_tensors.Mask(sample.label_map[None]),
        "boxes": None
        if sample.boxes is None
        else tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=canvas),
        "masks": None if sample.masks is None else tv_tensors.Mask(sample.masks),
    }
    moved = {name: None if value is None else function(value) for name, value in wrapped.items()}
    if moved["boxes"] is not None:
        moved["boxes"] = F.clamp_bounding_boxes(moved["boxes"])
    moved = {name: None if it is None else it.as_subclass(torch.Tensor) for name, it in moved.items()}
    if moved["label_map"] is not None:
        moved["label_map"] = moved["label_map"][0]
    return sample._replace(**moved)


def _drop_vanished(sample: DenseSample) -> DenseSample:
    """Drop the objects whose box or mask has no pixel left, with everything that belongs to them."""
    if sample.boxes is None:
        return sample
    keep = (_sides(sample.boxes) >= MIN_SIDE).all(1)
    if sample.masks is not None:
        keep &= sample.masks.flatten(1).any(1)
    if keep.all():
        return sample
    fields = {name: getattr(sample, name) for name in ("boxes", "labels", "masks", "crowd")}
    return sample._replace(**{name: None if it is None else it[keep] for name, it in fields.items()})


def _sides(boxes: torch.Tensor) -> torch.Tensor:
    """Width and height of boxes, [M, 2]."""
    return boxes[:, 2:] - boxes[:, :2]


def _enclose(masks: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    """Boxes around masks [M, H, W], cut to the boxes `within`; without an area for an empty mask."""
    boxes = torch.zeros_like(within)
    for number, mask in enumerate(masks):
        rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
        if len(rows):
            extent = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
            boxes[number] = torch.tensor(extent, dtype=boxes.dtype)
    low = torch.maximum(boxes[:, :2], within[:, :2])
    return torch.cat([low, torch.minimum(boxes[:, 2:], within[:, 2:])], dim=1)
