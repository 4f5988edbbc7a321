"""Whether bytes are a whole JPEG or PNG, and how large the picture is, from its markers and without decoding.

A marker walk costs a few microseconds, PIL 35 (measured). PIL, which also decodes in training, has the last
word on
whatever is not plain: what it opens is an image.
"""

import io
import struct
import warnings

MAX_PIXELS = 178_956_970  # PIL refuses to decode more: a bomb
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
}  # MPO: what PIL calls a JPEG with more pictures appended

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
SIZE_MARKERS = {0xFFC0, 0xFFC1, 0xFFC2}  # baseline, extended, progressive: nearly every file there is
SKIPPED_MARKERS = {0xFFC4, 0xFFCC, *range(0xFFDB, 0xFFFF)}  # tables, applications' own, comments
SEGMENT, FRAME = struct.Struct(">HH").unpack_from, struct.Struct(">BHH").unpack_from


def read_header(data: bytes | bytearray, size: int) -> tuple[str, int, int]:
    """Returns (extension by content, width, height) of the image in data[:size].

    Raises ValueError that says why it is no JPEG or PNG, or not a whole one, or too large to be decoded.
    """
    start = data[: min(8, size)]
    found = (
        _read_jpeg(data, size)
        if start[:3] == JPEG_START
        else _read_png(data, size)
        if start == PNG_START
        else None
    )
    extension, width, height, position = found or (*_ask_pil(data, size), 2)
    end = JPEG_END if extension == "jpg" else PNG_END
    # behind the header, else the thumbnail's own end would do; bytes after the end are common and harmless
    if not data.endswith(end, position, size) and data.rfind(end, position, size) < 0:
        raise ValueError("truncated: it has no end marker")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    return extension, width, height


def _read_jpeg(data: bytes | bytearray, size: int) -> tuple[str, int, int, int] | None:
    """Returns (extension, width, height, where the size segment ends); None: not plain."""
    position, last = 2, size - 9
    while position < last:
        marker, length = SEGMENT(data, position)
        if marker in SIZE_MARKERS:
            bits, height, width = FRAME(data, position + 4)
            plain = bits == 8 and width and height and length >= 11
            return ("jpg", width, height, position + 2 + length) if plain else None
        if marker not in SKIPPED_MARKERS or length < 2:
            return None
        position += 2 + length
    return None


def _read_png(data: bytes | bytearray, size: int) -> tuple[str, int, int, int] | None:
    if size < 33 or data[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return ("png", width, height, 33) if width and height else None


def _ask_pil(data: bytes | bytearray, size: int) -> tuple[str, int, int]:
    from PIL import Image, UnidentifiedImageError  # rarely needed, and 30 ms

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, but within the limit
            with Image.open(io.BytesIO(memoryview(data)[:size]), formats=("JPEG", "PNG")) as image:
                return EXTENSIONS[image.format], image.width, image.height
    except UnidentifiedImageError:  # its own text holds a memory address
        raise ValueError("not a JPEG or PNG image") from None
    except Exception as error:  # PIL lets nearly everything escape from a broken header
        raise ValueError(f"{type(error).__name__}: {error}") from None
