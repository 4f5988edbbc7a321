"""The header of a .safetensors file without torch: shapes and metadata, for checks before a run."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

SHORTEST = 10  # bytes: the header's length and an empty JSON object
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Header(NamedTuple):
    """Shapes of the tensors by name, and the strings of the metadata."""

    shapes: dict[str, list[int]]
    metadata: dict[str, str]


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as this format does, whatever its name: a length, then a JSON object."""
    with open_unbuffered(path) as file:
        start = file.read(SHORTEST)
    if len(start) < SHORTEST or start[8:9] != b"{":
        return False
    return struct.unpack("<Q", start[:8])[0] <= MAX_HEADER


def read_header(path: Path) -> Header | None:
    """Read a file's header; None where it is none or damaged, which the file's reader will explain."""
    try:
        if not is_safetensors(path):
            return None
        with open_unbuffered(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", {}))
        return Header({name: list(entry["shape"]) for name, entry in header.items()}, metadata)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def open_unbuffered(path: Path) -> BinaryIO:
    """Open a file for positional reads, unbuffered and without the kernel's read-ahead.

    Read-ahead would fetch what is not needed, and leave marks next to a header at which every later read, by
    whatever descriptor, reads ahead once more (8 MB each, on one disk).
    """
    file = open(path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file
