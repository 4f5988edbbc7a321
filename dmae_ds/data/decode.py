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

from dmae_ds.data.arrays import decode_array, is_array, read_array_header
from dmae_ds.data.pixels import MAX_PIXELS, RGB, PixelFormat, TooLarge, check_size, count_scans, to_rgb
from dmae_ds.data.reader import CorruptSample, Sample
from dmae_ds.data.shards import SOURCES, ShardError

PLAIN = {"YCbCr", "Gray", "RGB"}


class WrongChannels(ValueError):
    """An image with another number of channels than the recipe's."""


def decode_bytes(data: bytes, pixels: PixelFormat = RGB) -> np.ndarray:
    """Decode a JPEG or PNG to RGB, uint8 [H, W, 3], and a .npy array to [H, W, C], as the format says.

    Raises ValueError with a reason if it is not a whole image, or too large; WrongChannels.
    """
    image = _decode_array(data, pixels) if is_array(data) else _decode_rgb(data)
    if image.shape[2] != pixels.channels:
        raise WrongChannels(
            f"an image of {image.shape[2]} channels, and data.mean has {pixels.channels} numbers, one each"
        )
    return image if pixels.bits == 8 else image.astype(np.float32, copy=False)


def _decode_array(data: bytes, pixels: PixelFormat) -> np.ndarray:
    header = read_array_header(data)
    check_size(header.width, header.height)
    return decode_array(data, bits=pixels.bits)


def _decode_rgb(data: bytes) -> np.ndarray:
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
    except Image.DecompressionBombError:  # of twice PIL's own limit, before it tells the size
        raise TooLarge(
            f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, at most {MAX_PIXELS:,} are read"
        ) from None
    except UnidentifiedImageError:  # its own text contains a memory address
        raise ValueError("not a JPEG or PNG image, nor a .npy array") from None
    except (
        Exception
    ) as error:  # PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


def decode(sample: Sample, pixels: PixelFormat = RGB) -> np.ndarray:
    """Decode the image of a sample as `decode_bytes` does.

    Raises CorruptSample where that raises ValueError, and ShardError for another number of channels, which
    is the recipe's mistake and not the image's.
    """
    try:
        return decode_bytes(sample.data, pixels)
    except WrongChannels as error:
        raise ShardError(
            f"{sample.shard}: sample {sample.key} is {error}; set student.in_chans, data.mean and data.std "
            "(`dmae-shards info DST --mean-std` prints them)"
        ) from None
    except ValueError as error:
        raise CorruptSample(
            f"{sample.shard}: sample {sample.key} cannot be decoded ({error}); remove its source "
            f"(line {int(sample.key) + 1} of {SOURCES}) and make the shards again",
            sample_id=sample.sample_id,
            key=sample.key,
            shard=sample.shard,
            reason=str(error),
        ) from None
