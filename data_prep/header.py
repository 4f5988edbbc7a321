"""Check that bytes are a whole JPEG or PNG, and read the image's size, from markers and without decoding.

Reading the markers takes a few microseconds, PIL 35 (measured). Unusual headers are left to PIL, which also
decodes in training: a file that it opens is an image.
"""

import io
import struct
import warnings

from dmae_ds.data.arrays import is_array, read_array_header
from dmae_ds.data.pixels import check_size, count_scans

MAX_SHRUNK_PIXELS = 178_956_970  # of an image that --resize makes smaller: PIL refuses to decode more
# by PIL's format; MPO is a JPEG with further images appended
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
SIZE_MARKERS = {0xFFC0, 0xFFC1, 0xFFC2}  # baseline, extended, progressive: nearly every file
SKIPPED_MARKERS = {0xFFC4, 0xFFCC, *range(0xFFDB, 0xFFFF)}  # tables, application data, comments
SEGMENT, FRAME = struct.Struct(">HH").unpack_from, struct.Struct(">BHH").unpack_from


def read_header(data: bytes | bytearray, size: int, *, max_pixels: int | None = None) -> tuple[str, int, int]:
    """Read the header of the image in data[:size]; returns (extension by content, width, height).

    A .npy array [H, W, C] is an image too (dmae_ds/data/arrays.py).

    max_pixels: default, what training reads
    Raises ValueError with a reason if it is not a whole JPEG or PNG, or has too many pixels.
    """
    start, header = data[: min(8, size)], None
    if is_array(start):
        array = read_array_header(data, size)
        check_size(array.width, array.height, max_pixels=max_pixels)
        return "npy", array.width, array.height
    if start[:3] == JPEG_START:
        header = _read_jpeg(data, size)
    elif start == PNG_START:
        header = _read_png(data, size)
    extension, width, height, position = header or (*_ask_pil(data, size), 2)
    end = JPEG_END if extension == "jpg" else PNG_END
    # searched after the header, which may hold a thumbnail with an end; bytes after the end are common and
    # harmless
    if not data.endswith(end, position, size) and data.rfind(end, position, size) < 0:
        raise ValueError("truncated: it has no end marker")
    scans = count_scans(data, width * height, size) if extension == "jpg" else 1
    check_size(width, height, scans=scans, max_pixels=max_pixels)
    return extension, width, height


def find_mode(data: bytes | bytearray, size: int) -> str | None:
    """`alpha` for a PNG with transparency, `grey16` for one with 16-bit grey, else None."""
    if size < 33 or data[:8] != PNG_START or data[12:16] != b"IHDR":
        return None
    depth, colour, position = data[24], data[25], 33
    if colour in (4, 6):  # grey or RGB, with alpha
        return "alpha"
    while position + 8 <= size and (kind := data[position + 4 : position + 8]) != b"IDAT":
        if kind == b"tRNS":
            return "alpha"
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return "grey16" if (depth, colour) == (16, 0) else None


def _read_jpeg(data: bytes | bytearray, size: int) -> tuple[str, int, int, int] | None:
    """Read the markers of a JPEG: (extension, width, height, end of the size segment); None if unusual."""
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
    """Read the header of a PNG: (extension, width, height, end of the header); None if unusual."""
    if size < 33 or data[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return ("png", width, height, 33) if width and height else None


def _ask_pil(data: bytes | bytearray, size: int) -> tuple[str, int, int]:
    """Read extension, width and height with PIL. Raises ValueError."""
    from PIL import Image, UnidentifiedImageError  # takes 30 ms, and is rarely needed

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, but within the limit
            with Image.open(io.BytesIO(memoryview(data)[:size]), formats=("JPEG", "PNG")) as image:
                return EXTENSIONS[image.format], image.width, image.height
    except UnidentifiedImageError:  # its own text contains a memory address
        raise ValueError("not a JPEG or PNG image, which are read as 8-bit RGB") from None
    except Exception as error:  # PIL raises nearly anything for a broken header
        raise ValueError(f"{type(error).__name__}: {error}") from None
