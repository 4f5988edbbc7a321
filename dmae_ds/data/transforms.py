"""From a sample's bytes to uint8 pixels: MAE's recipe (random resized crop, flip) and its central crop for evaluation.

Every draw is keyed by (seed, epoch, sample id), never global: the same picture gets the same crop and the same mask on
any rank, in any worker and after any resume. Normalising is left to the device, on a quarter of the bytes.
"""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from dmae_ds.data.reader import Sample
from dmae_ds.data.shards import SOURCES, ShardError

# What is drawn from a sample's key; each needs its own stream.
CROP_STREAM, MASK_STREAM = 0, 1

CROP_RATIO = (3 / 4, 4 / 3)  # width / height; torchvision's default, which MAE keeps
NUM_CROP_TRIES = 10  # torchvision's


def sample_rng(seed: int, epoch: int, sample_id: int, stream: int) -> np.random.Generator:
    """The generator of one sample in one epoch. Seed and stream are Philox's key, epoch and id its counter's high
    words, so that no two of them ever share a draw."""
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, sample_id, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def decode(sample: Sample) -> Image.Image:
    """The picture in RGB. Raises ShardError for bytes that are no whole JPEG or PNG, or too many pixels (a bomb)."""
    try:
        image = Image.open(io.BytesIO(sample.data), formats=("JPEG", "PNG"))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:  # its own text is a memory address
        reason = "not a JPEG or PNG image"
    except Exception as error:  # PIL's decoders let nearly everything escape: OSError, SyntaxError, struct.error, ...
        reason = f"{type(error).__name__}: {error}"
    raise ShardError(
        f"{sample.shard}: sample {sample.key} cannot be decoded ({reason}); take its source "
        f"(line {int(sample.key) + 1} of {SOURCES}) out and make the shards again"
    )


def train_view(
    image: Image.Image, rng: np.random.Generator, *, img_size: int, crop_scale: tuple[float, float], flip: bool
) -> np.ndarray:
    """A random crop, resized, flipped half of the time: uint8 [3, img_size, img_size]."""
    box = crop_box(rng, width=image.width, height=image.height, scale=crop_scale, ratio=CROP_RATIO)
    # crop, then resize: resize(box=...) is another function, whose filter sees pixels outside the box
    view = image.crop(box).resize((img_size, img_size), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_chw(view)


def eval_view(image: Image.Image, *, img_size: int, crop_pct: float) -> np.ndarray:
    """The central crop after resizing the short side to img_size / crop_pct: uint8 [3, img_size, img_size]."""
    short = round(img_size / crop_pct)
    width, height = (short * side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - img_size) / 2), round((height - img_size) / 2)
    return _to_chw(resized.crop((left, top, left + img_size, top + img_size)))


def crop_box(
    rng: np.random.Generator, *, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop: (left, top, right, bottom).

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


def _to_chw(image: Image.Image) -> np.ndarray:
    # [H, W, 3] -> [3, H, W]
    return np.asarray(image).transpose(2, 0, 1)
