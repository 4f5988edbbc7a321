"""Read the header of a .safetensors file: JSON with every tensor's place."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from dmae_ds.errors import UserError
from dmae_ds.weights.label import Label
from dmae_ds.weights.places import Container, Place, describe_error, open_unbuffered

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DAMAGED = (OSError, struct.error, ValueError, TypeError, AttributeError, KeyError, RuntimeError)


def open_safetensors(path: Path, label: Label) -> Container:
    """Read the header and nothing else. Raises UserError unless its places fill the file exactly.

    The package's own `safe_open` maps the file, and its first page fault read 8 MB.
    """
    try:
        return _read_header(path, label)
    except _DAMAGED as error:
        raise UserError(
            f"{label.weights} '{path}' is not a complete safetensors file ({describe_error(error)}); copy "
            "it again, or save it again"
        ) from None


def _read_header(path: Path, label: Label) -> Container:
    with open_unbuffered(path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, _MAX_HEADER)))
    metadata = dict(header.pop("__metadata__", {}))
    places: dict[str, Place] = {}
    end = 0  # tensors follow each other without a gap, by the format
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}, known are {', '.join(_DTYPES)}")
        strides = torch.empty(shape, device="meta").stride()
        place = Place(path, _DTYPES[entry["dtype"]], shape, strides, 8 + length + end)
        if (first, last) != (end, end + place.num_bytes):
            raise ValueError(f"{name} is at {first}-{last} instead of {end}-{end + place.num_bytes}")
        places[name] = place
        end = last
    size = path.stat().st_size
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes instead of {8 + length + end}")
    return Container(path, places, metadata, label=label)
