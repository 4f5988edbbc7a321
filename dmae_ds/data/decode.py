"""Decode the bytes of a JPEG or PNG to uint8 RGB, as the official recipe's PIL does, in half of the time.

simplejpeg (its own libjpeg-turbo) decodes plain JPEGs, strictly: at its first warning PIL decodes the image,
and an image that PIL refuses is corrupt. PIL also decodes CMYK, which simplejpeg inverts, and PNG. Images are
not rotated by
their EXIF orientation: the recipe (PIL's loader) does not either, and `dmae-shards make --resize` stores them
upright. BENCHMARKS.md, "Decoding", compares the alternatives.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from dmae_ds.data.reader import CorruptSample, Sample
from dmae_ds.data.shards import SOURCES

MAX_PIXELS = 2**26  # 67 M: 200 MB of RGB, under 1 GiB in every decoder; a photograph has 1 to 50 M
# pixels x scans of a progressive JPEG: ten scans are usual, thousands are an attack
MAX_SCANNED_PIXELS = 2**30
# pixels x bytes from which scans are counted: below, no number of them takes seconds; counting costs 5% of
# decoding
COUNT_FROM = 2**36
PLAIN = {"YCbCr", "Gray", "RGB"}


def decode_bytes(data: bytes) -> np.ndarray:
    """Decode to RGB, uint8 [H, W, 3].

    Raises ValueError with a reason if it is not a whole JPEG or PNG, or too large.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except (ValueError, OSError):
            return _decode_with_pil(data)
        _check_size(width, height, scans=_count_scans(data, width * height))
        if colorspace in PLAIN:
            try:
                return simplejpeg.decode_jpeg(data)
            except (ValueError, OSError):  # at its first warning
                pass
    return _decode_with_pil(data)


def _decode_with_pil(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of images that are within our own limits
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                scans = 1 if image.format == "PNG" else _count_scans(data, image.width * image.height)
                _check_size(image.width, image.height, scans=scans)
                return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except TooLarge:
        raise
    except UnidentifiedImageError:  # its own text contains a memory address
        raise ValueError("not a JPEG or PNG image") from None
    except (
        Exception
    ) as error:  # PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


def decode(sample: Sample) -> np.ndarray:
    """Decode the image of a sample to RGB, uint8 [H, W, 3].

    Raises CorruptSample where decode_bytes raises ValueError.
    """
    try:
        return decode_bytes(sample.data)
    except ValueError as error:
        raise CorruptSample(
            f"{sample.shard}: sample {sample.key} cannot be decoded ({error}); remove its source "
            f"(line {int(sample.key) + 1} of {SOURCES}) and make the shards again",
            sample_id=sample.sample_id,
            key=sample.key,
            shard=sample.shard,
            reason=str(error),
        ) from None


class TooLarge(ValueError):
    """An image with more pixels than any photograph has."""


def _count_scans(data: bytes, num_pixels: int) -> int:
    return data.count(b"\xff\xda") if num_pixels * len(data) > COUNT_FROM else 1


def _check_size(width: int, height: int, *, scans: int) -> None:
    if width * height > MAX_PIXELS or width * height * scans > MAX_SCANNED_PIXELS:
        raise TooLarge(
            f"{width}x{height} pixels in {scans} scans; at most {MAX_PIXELS:,} pixels are read, and at most "
            f"{MAX_SCANNED_PIXELS:,} pixels x scans"
        )
