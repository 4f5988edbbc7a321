"""Rules for pixels that the shard tool, training, evaluation and export have in common.

Which images are read (one limit for all), and how every mode becomes RGB: transparency is laid on white, and
16-bit grey keeps the upper byte of each pixel, as PIL does for 16-bit colour. Without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from dmae_ds.config.data import DataConfig

MAX_PIXELS = 2**26  # 67 M: 200 MB of RGB, under 1 GiB in every decoder; a photograph has 1 to 50 M
# pixels x scans of a progressive JPEG: ten scans are usual, thousands are an attack
MAX_SCANNED_PIXELS = 2**30
# pixels x bytes from which scans are counted: below, no number of them takes seconds; counting costs 5% of
# decoding
COUNT_FROM = 2**36


class PixelFormat(NamedTuple):
    """What images are decoded to: [H, W, channels], uint8; float32 from 0 to 255 where bits is 16.

    It is that of a recipe's data section: one number of data.mean for each channel, and data.bits.
    """

    channels: int = 3
    bits: int = 8

    @classmethod
    def of(cls, data: DataConfig) -> PixelFormat:
        """The format that a recipe's data section asks for."""
        return cls(len(data.mean), data.bits)


RGB = PixelFormat()


class TooLarge(ValueError):
    """An image with more pixels than are read."""


def check_size(width: int, height: int, *, scans: int = 1, max_pixels: int | None = None) -> None:
    """Raise TooLarge for an image that is not read. max_pixels: default MAX_PIXELS"""
    max_pixels = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > max_pixels:
        remedy = "; `dmae-shards make --resize N` stores it smaller" if max_pixels == MAX_PIXELS else ""
        raise TooLarge(f"{width}x{height} pixels, at most {max_pixels:,} are read{remedy}")
    if width * height * scans > MAX_SCANNED_PIXELS:
        raise TooLarge(
            f"{width}x{height} pixels in {scans} scans, at most {MAX_SCANNED_PIXELS:,} pixels x scans are "
            f"read"
        )


def count_scans(data: bytes | bytearray, num_pixels: int, size: int | None = None) -> int:
    """Scans of a JPEG in data[:size]; 1 where it is so small that their number does not matter."""
    size = len(data) if size is None else size
    return data.count(b"\xff\xda", 0, size) if num_pixels * size > COUNT_FROM else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB, with transparency on white and 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # I;16, or I in older versions of PIL
        return _scale_grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
