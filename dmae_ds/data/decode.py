"""Decode the bytes of a JPEG or PNG to uint8 RGB, as the official recipe's PIL does, in half of the time.

simplejpeg (its own libjpeg-turbo) decodes plain JPEGs, strictly: at its first warning PIL decodes the image,
and an image that PIL refuses is corrupt. PIL also decodes CMYK, which simplejpeg inverts, and PNG. Other than
in the recipe, transparency is laid on white and 16-bit grey is scaled (`dmae_ds/data/pixels.py`): PIL's RGB
has whatever colour lies under the transparency, mostly black, and clips nearly every 16-bit pixel to white.
Images are not rotated by their EXIF orientation: the recipe (PIL's loader) does not either, and
`dmae-shards make --resize` stores them upright. BENCHMARKS.md, "Decoding", compares the alternatives.
"""

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from dmae_ds.data.pixels import TooLarge, check_size, count_scans, to_rgb
from dmae_ds.data.reader import CorruptSample, Sample
from dmae_ds.data.shards import SOURCES

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
        check_size(width, height, scans=count_scans(data, width * height))
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
                scans = 1 if image.format == "PNG" else count_scans(data, image.width * image.height)
                check_size(image.width, image.height, scans=scans)
                return np.array(to_rgb(image))
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
