"""Read the names and places of a .pth, .pt or .bin file of torch.save, without running a pickle's code.

torch's zip files are opened with weights_only=True and mmap. Besides tensors only plain data is allowed, such
as the argparse.Namespace of published checkpoints; see plain_data.py.
"""

from __future__ import annotations

import argparse
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.label import Label
from dmae_ds.weights.places import Container, Place, describe_error, open_unbuffered
from dmae_ds.weights.plain_data import StandIn, allowed_globals
from dmae_ds.weights.roots import find_roots, unwrapped

# Errors that damaged pickles and zip directories were seen to raise.
_DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
)
_COMPRESSED = -1  # in place of a record's size


def open_torch(
    path: Path,
    entries: tuple[str, ...],
    formats: dict[str, list[str]],
    label: Label,
    anchor: re.Pattern | None = None,
) -> Container:
    """Open a file of torch.save; only names and places are read.

    anchor: of the patch projection; where it is found, in any entry, the container has every tensor of the
    file under its entries' names, joined by dots, for `roots.narrow`
    entries: otherwise, names under which it may hold its weights; the first that is there wins, else the top
    level
    formats: {entry: the formats that read it}, to suggest one where another entry is found
    Raises UserError where the file is damaged, would run code, or holds no plain tensors.
    """
    if not is_zip(path):
        raise UserError(
            f"{label.weights} '{path}' is not a complete file of torch.save's zip format (cut off, or older "
            f"than torch 1.6); copy it again, or rewrite an old one: torch.save(torch.load('{path.name}', "
            "weights_only=True), 'new.pth')"
        )
    try:
        with torch.serialization.safe_globals(allowed_globals(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sparse tensors and pickle protocols, which are not needed
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        records = _read_records(path)
    except _DAMAGED as error:
        raise UserError(
            f"{label.weights} '{path}' can't be read as plain tensors, and nothing in it was run "
            f"({describe_error(error)}); copy it again, or where you trust it save its state dict as "
            ".safetensors with safetensors.torch.save_file"
        ) from None
    tensors: object = _join_entries(content) if anchor is not None else {}
    if not find_roots(map(unwrapped, tensors), anchor):
        # A file of a format with other names: `fit.py` says which one.
        others = tuple(formats) if anchor is not None else ()
        tensors = _find_tensors(content, entries + others)
        if others and not _is_state_dict(tensors):
            tensors = _largest_state_dict(content)
        if not _is_state_dict(tensors):
            raise UserError(f"{label.weights} '{path}' {_describe_content(content, entries, formats, label)}")
    container = Container(path, _find_places(path, content, tensors, records), label=label)
    if isinstance(content, dict):
        container.entries = frozenset(str(name) for name, held in content.items() if isinstance(held, dict))
    return container


def _join_entries(content: object, start: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts under the names of its entries, joined by dots."""
    joined: dict[str, Tensor] = {}
    for name, held in content.items() if isinstance(content, dict) else ():
        if isinstance(held, Tensor):
            joined[f"{start}{name}"] = held
        elif isinstance(held, dict):
            joined |= _join_entries(held, f"{start}{name}.")
    return joined


def _find_places(
    path: Path, content: object, tensors: dict[str, Tensor], records: dict[int, int]
) -> dict[str, Place]:
    """Places of the tensors in the file; those whose bytes are not their values have a problem instead."""
    # torch maps the file as a whole: a storage's address tells which record it is.
    base = min((_address(value) for value in _tensors_in(content)), default=0) - min(records, default=0)
    places = {}
    for name, value in tensors.items():
        start = _start_in_file(value, base, records)
        if start is None:
            problem = "is not stored as plain bytes (it is sparse, quantised or compressed, say)"
            places[name] = Place(path, torch.uint8, (0,), (1,), 0, problem)
            continue
        offset = start + value.storage_offset() * value.dtype.itemsize
        places[name] = Place(path, value.dtype, tuple(value.shape), value.stride(), offset)
    return places


def is_zip(path: Path) -> bool:
    """Whether a file is a complete zip archive, as torch.save writes since torch 1.6."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _find_tensors(content: object, entries: tuple[str, ...]) -> object:
    """The first of these entries that is a dict, else the content itself."""
    if isinstance(content, dict):
        for entry in entries:
            if isinstance(content.get(entry), dict):
                return content[entry]
    return content


def _largest_state_dict(content: object) -> object:
    """The dict of tensors with the most names among the content's entries, at any depth; else the content."""
    dicts = [content] if isinstance(content, dict) else []
    for held in dicts:  # grows while it is read
        dicts += [value for value in held.values() if isinstance(value, dict)]
    return max(filter(_is_state_dict, dicts), key=len, default=content)


def _is_state_dict(tensors: object) -> bool:
    if not isinstance(tensors, dict) or not tensors:
        return False
    return all(isinstance(value, Tensor) and isinstance(name, str) for name, value in tensors.items())


def _describe_content(
    content: object, entries: tuple[str, ...], formats: dict[str, list[str]], label: Label
) -> str:
    """Describe a file without the expected tensors: its content, the expected one, and a format for it."""
    advice = f"is {label.format} right?" if label.format else "give a file of a network's weights"
    if isinstance(content, dict):
        held = ", ".join(map(str, list(content)[:6])) or "nothing"
        fitting = [entry for entry in formats if isinstance(content.get(entry), dict)]
        if fitting and label.format:
            advice = label.set_format(*formats[fitting[0]])
    else:
        held = type(content).__name__
    expected = " or ".join([*(f"an entry '{entry}'" for entry in entries), "a plain dict of tensors"])
    return f"holds {held}, expected {expected}; {advice}"


def _start_in_file(tensor: Tensor, base: int, records: dict[int, int]) -> int | None:
    """Where the tensor's storage begins in the file; None unless its bytes in the file are its values."""
    if not _is_plain(tensor):
        return None
    if not tensor.numel():
        return 0
    start = _address(tensor) - base
    whole_record = records.get(start) == tensor.untyped_storage().nbytes()
    return start if whole_record and base % mmap.PAGESIZE == 0 else None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Whether the entries in the file are the tensor's values: not sparse, quantised or conjugated."""
    changed = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not changed


def _tensors_in(content: object) -> Iterator[Tensor]:
    """Every tensor of a nested checkpoint that has bytes in the file."""
    if isinstance(content, Tensor):
        on_cpu = content.layout is torch.strided and content.device.type == "cpu"
        if on_cpu and content.untyped_storage().nbytes():
            yield content
    elif isinstance(content, (dict, list, tuple, set, argparse.Namespace, StandIn)):
        items = vars(content) if isinstance(content, (argparse.Namespace, StandIn)) else content
        for value in items.values() if isinstance(items, dict) else items:
            yield from _tensors_in(value)


def _read_records(path: Path) -> dict[int, int]:
    """Records of tensors, without empty ones: {where the payload begins: its size in bytes}.

    A compressed record has size -1 (torch.save never makes one).
    """
    records = {}
    with open_unbuffered(path) as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size:
                # A local header ends with the lengths of name and extra field.
                name, extra = struct.unpack("<HH", os.pread(file.fileno(), 4, record.header_offset + 26))
                stored = record.compress_type == zipfile.ZIP_STORED
                start = record.header_offset + 30 + name + extra
                records[start] = record.file_size if stored else _COMPRESSED
    return records
