"""What `make` does to pixels, only when asked: decode them to see whether that works, or store smaller pictures."""

import io
import warnings

from PIL import Image, ImageOps

from data_prep.header import EXTENSIONS

ORIENTATION = 0x0112  # the EXIF tag; 1: upright


def check_pixels(data: bytes | memoryview) -> None:
    """Raises ValueError if the image cannot be decoded to its last row."""
    _open(data)


def shrink(
    data: bytes | memoryview, *, short_side: int, quality: int
) -> tuple[bytes | memoryview, str, int, int]:
    """Returns (bytes, extension, width, height) of an upright picture whose short side is at most `short_side`.

    A picture that is upright and small enough keeps its bytes; any other becomes an RGB JPEG without
    metadata.
    Raises ValueError if it cannot be decoded.
    """
    image = _open(data)
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except (
        Exception
    ):  # PIL's reader of broken EXIF raises nearly anything; then nothing says that it is turned
        orientation = 1
    if orientation in range(2, 9):
        image = ImageOps.exif_transpose(image)
    elif min(image.size) <= short_side:
        return data, EXTENSIONS[image.format], image.width, image.height
    image = image.convert("RGB")
    if min(image.size) > short_side:
        width, height = (max(1, round(short_side * side / min(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
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
    ) as error:  # PIL's decoders let nearly everything escape: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"it cannot be decoded: {type(error).__name__}: {error}") from None
