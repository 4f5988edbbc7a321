"""Read the header of a .safetensors file: JSON with every tensor's place."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch

from dmae_ds.errors import UserError
from dmae_ds.output.safetensors_header import MAX_HEADER
from dmae_ds.weights.label import Label
from dmae_ds.weights.places import Container, Place, describe_error, open_unbuffered

# {the header's word: torch's name}; torch of this machine may lack some.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
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
        header = json.loads(file.read(min(length, MAX_HEADER)))
    metadata = dict(header.pop("__metadata__", {}))
    places: dict[str, Place] = {}
    end = 0  # tensors follow each other without a gap, by the format
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        place = _place(path, entry, 8 + length + end)
        if (first, last) != (end, end + place.num_bytes):
            raise ValueError(f"{name} is at {first}-{last} instead of {end}-{end + place.num_bytes}")
        places[name] = place
        end = last
    size = path.stat().st_size
    if size != 8 + length + end:
        raise ValueError(f"{size} bytes instead of {8 + length + end}")
    return Container(path, places, metadata, label=label)


def _place(path: Path, entry: dict, offset: int) -> Place:
    shape = tuple(entry["shape"])
    dtype = getattr(torch, _DTYPES.get(entry["dtype"], "unknown"), None)
    if dtype is None:
        # Its bytes are skipped; that matters only where the tensor is needed.
        first, last = entry["data_offsets"]
        problem = f"is {entry['dtype']}, readable are {', '.join(_DTYPES)}"
        return Place(path, torch.uint8, (last - first,), (1,), offset, problem)
    return Place(path, dtype, shape, torch.empty(shape, device="meta").stride(), offset)
