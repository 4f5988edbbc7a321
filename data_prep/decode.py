"""Decode images for `make`: to check that they can be decoded, or to store smaller ones."""

import io
import warnings

from PIL import Image, ImageOps

from data_prep.header import EXTENSIONS
from dmae_ds.data.pixels import check_size, to_rgb

ORIENTATION = 0x0112  # the EXIF tag; 1: upright


def check_pixels(data: bytes | memoryview) -> bool:
    """Whether all pixels have one colour, with transparent ones white.

    Raises ValueError if the image cannot be decoded to its last row.
    """
    return all(low == high for low, high in to_rgb(_open(data)).getextrema())


def orientation_of(data: bytes | memoryview) -> int:
    """EXIF orientation of an image, 1 to 8; 1: upright, also without or with broken EXIF data."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return _orientation(image)
    except Exception:  # PIL raises nearly anything
        return 1


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # PIL raises nearly anything for broken EXIF data; then the image counts as upright
        orientation = 1
    return orientation if orientation in range(2, 9) else 1


def shrink(
    data: bytes | memoryview, *, short_side: int | None, quality: int
) -> tuple[bytes | memoryview, str, int, int]:
    """Shrink an image to `short_side` and rotate it upright; returns (bytes, extension, width, height).

    An image that is upright and small enough keeps its bytes; any other becomes an RGB JPEG without metadata.
    short_side: None: of any size
    Raises ValueError if it cannot be decoded.
    """
    image = _open(data)
    short_side = min(image.size) if short_side is None else short_side
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    elif min(image.size) <= short_side:
        check_size(*image.size)
        return data, EXTENSIONS[image.format], image.width, image.height
    image = to_rgb(image)
    if min(image.size) > short_side:
        width, height = (max(1, round(short_side * side / min(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    check_size(*image.size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, exif=b"", icc_profile=None)
    return file.getvalue(), "jpg", image.width, image.height


def _open(data: bytes | memoryview) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, but within the limit
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            image.load()
        return image
    except (
        Exception
    ) as error:  # PIL's decoders raise nearly anything: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"it cannot be decoded: {type(error).__name__}: {error}") from None
