"""Views of uint8 images as in MAE: random resized crop and flip to train, a central crop to evaluate.

Every draw is keyed by (seed, epoch, sample id, view), never global: an image gets the same crop and the same
mask on any rank, in any worker and after any resume. Resizing is torch's antialiased bicubic on uint8, on the
crop alone: at most a few grey levels from PIL's (.02 in the mean). The device normalises, so a quarter of the
bytes is copied.
"""

import math

import numpy as np
import torch

from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.photometric import PHOTOMETRIC

# Random streams of a sample, one for each kind of draw.
CROP_STREAM, MASK_STREAM, AUGMENT_STREAM, ERASE_STREAM, PHOTOMETRIC_STREAM = range(5)

CROP_RATIO = (3 / 4, 4 / 3)  # width / height; torchvision's default, which MAE keeps
NUM_CROP_TRIES = 10  # torchvision's


def sample_rng(seed: int, epoch: int, sample_id: int, stream: int, *, view: int = 0) -> np.random.Generator:
    """Generator of one view of one sample in one epoch.

    Seed and stream are Philox's key; view, id and epoch are the high words of its counter, so no two
    generators share a draw.
    """
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, view, sample_id, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def draw_views(
    image: np.ndarray, spec: BatchSpec, *, epoch: int, sample_id: int, first_view: int = 0
) -> list[np.ndarray]:
    """Draw the views of an image, uint8 [H, W, 3]: each uint8 [3, S, S].

    first_view: number that keys the first view's draws, above 0 for an image that comes again in this epoch
    (data.repeat)
    """
    crops, drawn = [], []
    for number, view in enumerate(spec.views, start=first_view):
        if view.copy_of is not None:
            pixels = crops[view.copy_of]
        else:
            pixels = train_view(
                image,
                sample_rng(spec.seed, epoch, sample_id, CROP_STREAM, view=number),
                img_size=view.size or spec.img_size,
                crop_scale=view.scale or spec.crop_scale,
                flip=spec.flip,
                crop=spec.crop,
            )
        crops.append(pixels)
        change = PHOTOMETRIC[view.photometric]
        if change is not None:
            pixels = change(pixels, sample_rng(spec.seed, epoch, sample_id, PHOTOMETRIC_STREAM, view=number))
        drawn.append(pixels)
    return drawn


def train_view(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    img_size: int,
    crop_scale: tuple[float, float],
    flip: bool,
    crop: str = "torchvision",
) -> np.ndarray:
    """Crop uint8 [H, W, 3] at random, resize, and flip half of the time: uint8 [3, img_size, img_size].

    crop: one of CROPS
    """
    height, width, _ = image.shape
    left, top, right, bottom = CROPS[crop](
        rng, width=width, height=height, scale=crop_scale, ratio=CROP_RATIO
    )
    # no pixel outside the box is used
    view = _resize(image[top:bottom, left:right], width=img_size, height=img_size)
    return (view.flip(2) if flip and rng.random() < 0.5 else view).numpy()


def eval_view(image: np.ndarray, *, img_size: int, crop_pct: float) -> np.ndarray:
    """Resize the short side to img_size / crop_pct and crop the centre: uint8 [3, img_size, img_size]."""
    short = round(img_size / crop_pct)
    height, width = (short * side // min(image.shape[:2]) for side in image.shape[:2])
    left, top = round((width - img_size) / 2), round((height - img_size) / 2)
    return _resize(image, width=width, height=height)[:, top : top + img_size, left : left + img_size].numpy()


def _resize(image: np.ndarray, *, width: int, height: int) -> torch.Tensor:
    """Resize uint8 [H, W, 3] to uint8 [3, height, width], antialiased bicubic."""
    # [H, W, 3] -> [1, H, W, 3] -> [1, 3, H, W] with channels last, which torch's vectorised path requires:
    # the axis of one must be added before the others are permuted, or its stride hides the layout.
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)[0]


def crop_box(
    rng: np.random.Generator,
    *,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's RandomResizedCrop does: (left, top, right, bottom).

    scale: range of the crop's share of the area, uniform; ratio: range of its width / height, log-uniform
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(NUM_CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    # no try fitted: the largest central crop whose ratio is allowed
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def clamped_crop_box(
    rng: np.random.Generator,
    *,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a crop as TensorFlow and MAE's linear probe do: one draw, cut to the image."""
    area = width * height * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w = max(1, min(round(math.sqrt(area * aspect)), width))
    h = max(1, min(round(math.sqrt(area / aspect)), height))
    left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    return left, top, left + w, top + h


CROPS = {"torchvision": crop_box, "tensorflow": clamped_crop_box}
