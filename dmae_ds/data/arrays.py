"""Images of any number of channels: .npy members [H, W, C] (or [H, W]), uint8 or uint16, without pickles."""

from __future__ import annotations

import io
import re
from typing import NamedTuple

import numpy as np

MAGIC = b"\x93NUMPY"
_DTYPES = (np.dtype("u1"), np.dtype("<u2"), np.dtype(">u2"))
_LONGEST_HEADER = 4096  # bytes; numpy writes 128


class ArrayHeader(NamedTuple):
    """Shape and dtype of an array, and where its values begin."""

    height: int
    width: int
    channels: int
    dtype: np.dtype
    offset: int

    @property
    def end(self) -> int:
        """Bytes of the file."""
        return self.offset + self.height * self.width * self.channels * self.dtype.itemsize


def is_array(data: bytes | bytearray | memoryview) -> bool:
    """Whether bytes begin as a .npy file does."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def read_array_header(data: bytes | bytearray | memoryview, size: int | None = None) -> ArrayHeader:
    """Read the header of the .npy file in data[:size].

    Raises ValueError with a reason unless it is a whole image: [H, W] or [H, W, C], of 8 or 16 bits, C order.
    """
    size = len(data) if size is None else size
    file = io.BytesIO(bytes(data[: min(size, _LONGEST_HEADER)]))
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, is_fortran, dtype = read[version](file)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(f"not a .npy file of version 1 or 2 ({' '.join(str(error).split())[:80]})") from None
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype not in _DTYPES or is_fortran:
        order = " in Fortran order" if is_fortran else ""
        raise ValueError(
            f"an array {list(shape)} of {dtype}{order}; an image is [H, W, C] of uint8 or uint16, in C order"
        )
    header = ArrayHeader(shape[0], shape[1], shape[2] if len(shape) == 3 else 1, dtype, file.tell())
    if size < header.end:
        raise ValueError(f"truncated: {size:,} bytes of {header.end:,}")
    return header


def describe_array(header: ArrayHeader) -> str:
    """What a set of such arrays is called in its manifest: `arrays of 4 channels, 16 bits`."""
    return f"arrays of {header.channels} channels, {8 * header.dtype.itemsize} bits"


def channels_in(images: str) -> int | None:
    """Number of channels of a set by what its manifest calls its images; None where it does not say."""
    found = re.match(r"arrays of (\d+) channels", images)
    return int(found[1]) if found else None


def decode_array(data: bytes, *, bits: int) -> np.ndarray:
    """Decode a .npy image to [H, W, C]: uint8, or float32 from 0 to 255 where `bits` is 16.

    bits 8: of 16-bit values the upper byte, as of 16-bit grey PNGs. Raises ValueError with a reason.
    """
    header = read_array_header(data)
    values = np.frombuffer(data, header.dtype, header.height * header.width * header.channels, header.offset)
    values = values.reshape(header.height, header.width, header.channels)
    if bits == 16:
        scale = 257 if header.dtype.itemsize == 2 else 1  # 65535 and 255 are white
        return values.astype(np.float32) / np.float32(scale)
    return (values >> 8).astype(np.uint8) if header.dtype.itemsize == 2 else values
