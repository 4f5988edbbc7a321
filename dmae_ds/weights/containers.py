"""Weights files as tables of tensors, of which only those that are asked for are read (and never a pickle's code run).

A container knows, from its header alone, every tensor's name, shape, dtype and place in the file. `read` fetches one by
positional reads into memory of its own: exactly its bytes. (Mapping the file instead was measured, in BENCHMARKS.md: more
bytes from the disk, by the kernel's read-ahead, and every byte resident twice while it is copied.)

    .safetensors               a JSON header with every tensor's place
    .pth .pt .bin              torch's zip files, opened with weights_only=True and mmap; argparse.Namespace is let in
                               (published checkpoints pickle one beside the weights): it is plain data
    *.index.json, or a folder  parts of either kind, joined
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, Mapping

import torch
from torch import Tensor

from dmae_ds.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# What a folder may hold, the first that is there wins: transformers' and our own names.
IN_A_FOLDER = (
    "student.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
# What a damaged pickle or zip directory was seen to raise.
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
_SAFETENSORS_DTYPES = {
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


@dataclass(frozen=True)
class Place:
    """One tensor in a file: `offset` and `num_bytes` in bytes, `strides` in entries."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def num_entries(self) -> int:
        """Entries from the first to the last, whatever the strides."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def num_bytes(self) -> int:
        return self.num_entries * self.dtype.itemsize


class Container(Mapping):
    """{name in the file: tensor}. `entry` of a .pth (`model`, `state_dict`, ...) is chosen by the format.

    places: {name: where it is}; metadata: what the file says of itself (safetensors), strings
    absent: parts that an index names and that are not here; a rank that needs none of their tensors needs none of them
    """

    def __init__(self, path: Path, places: dict[str, Place], metadata: dict[str, str] | None = None):
        self.path, self.places, self.metadata = path, places, metadata or {}
        self.absent: list[str] = []
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's own would read the tensor

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor: a copy of its own, contiguous, in the file's dtype."""
        place = self.places[name]
        flat = _allocate(place)
        if place.num_bytes:
            self.bytes_read += _read_into(place, memoryview(flat.view(torch.uint8).numpy()))
        return flat.as_strided(place.shape, place.strides).contiguous()

    def like(self, name: str) -> Tensor:
        """The tensor on the meta device: its shape and dtype, without reading it."""
        return torch.empty(self.places[name].shape, dtype=self.places[name].dtype, device="meta")


def _allocate(place: Place) -> Tensor:
    """[num_entries]: large ones in pages of their own, which go back to the system when a converted copy is all that is kept.

    From malloc, a ViT-B read in fp32 and kept in bf16 held 1.6 times its bytes: freed holes between what stayed.
    """
    if place.num_bytes < 1 << 20:
        return torch.empty(place.num_entries, dtype=place.dtype)
    return torch.frombuffer(mmap.mmap(-1, place.num_bytes), dtype=place.dtype)


def _read_into(place: Place, buffer: memoryview) -> int:
    done = 0
    with _open_for_places(place.path) as file:
        while done < len(buffer):
            count = os.preadv(file.fileno(), [buffer[done : done + (1 << 26)]], place.offset + done)
            if count == 0:
                raise UserError(
                    f"teacher.weights '{place.path}' ends at byte {place.offset + done}, inside a tensor; copy it again"
                )
            done += count
    return done


def _open_for_places(path: Path) -> BinaryIO:
    """Unbuffered, and without the kernel's read-ahead: it would fetch what is not needed, and leave marks beside a header
    at which every later read, by whatever descriptor, reads ahead once more (8 MB each, on one disk)."""
    file = open(path, "rb", buffering=0)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def open_container(
    path: Path, entries: tuple[str, ...] = (), formats: dict[str, list[str]] | None = None
) -> Container:
    """Open a weights file, an index of parts, or a folder that holds one of IN_A_FOLDER.

    entries: names under which a .pth may hold its weights; the first that is there wins, else the top level itself
    formats: {entry: the formats that read it}, to suggest where another entry is found
    Raises UserError where the file is missing, damaged, of an unknown kind, or wants to run code.
    """
    if path.is_dir():
        found = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise UserError(
                f"teacher.weights '{path}' is a folder with none of {', '.join(IN_A_FOLDER)}; give the weights file itself"
            )
        path = found
    if not path.is_file():
        raise UserError(
            f"teacher.weights '{path}' is not a file; give the path of a {', '.join(SUFFIXES)} file, an index, or a folder"
        )
    if path.name.endswith(".index.json"):
        names = parts_of_index(path)
        here = [name for name in names if (path.parent / name).is_file()]
        joined = join_containers(
            path, [open_container(path.parent / name, entries, formats) for name in here]
        )
        joined.absent = [name for name in names if name not in here]
        return joined
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in SUFFIXES:
        return _open_torch(path, entries, formats or {})
    raise UserError(
        f"teacher.weights '{path}' ends in '{path.suffix}'; known are {', '.join(SUFFIXES)} and .index.json"
    )


def join_containers(path: Path, parts: list[Container]) -> Container:
    """Several containers as one; a name that two of them hold is read from the first."""
    joined = Container(path, {})
    for part in reversed(parts):
        joined.places |= part.places
        joined.metadata |= part.metadata
    return joined


def parts_of_index(path: Path) -> list[str]:
    """The file names of an index's parts, all in its folder. Raises UserError."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"teacher.weights '{path}' is not an index of parts ({type(error).__name__}: {error}); copy it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise UserError(
                f"teacher.weights '{path}' names the part {name!r}, which is not the plain name of a weights file; the index can't be trusted"
            )
    return names


def _open_safetensors(path: Path) -> Container:
    """Read the header and nothing else (safetensors' own `safe_open` maps the file, whose first fault read 8 MB of it)."""
    size = path.stat().st_size
    places, end = {}, 0  # tensors follow each other without a gap, by the format
    try:
        with _open_for_places(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        metadata = dict(header.pop("__metadata__", {}))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise ValueError(f"{name} is {entry['dtype']}, known are {', '.join(_SAFETENSORS_DTYPES)}")
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            places[name] = Place(
                path, dtype, shape, torch.empty(shape, device="meta").stride(), 8 + length + end
            )
            if (first, last) != (end, end + places[name].num_bytes):
                raise ValueError(
                    f"{name} is at {first}-{last} instead of {end}-{end + places[name].num_bytes}"
                )
            end = last
        if size != 8 + length + end:
            raise ValueError(f"{size} bytes instead of {8 + length + end}")
    except (OSError, struct.error, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"teacher.weights '{path}' is not a whole safetensors file ({_reason(error)}); copy it again, or save it anew"
        ) from None
    return Container(path, places, metadata)


def _open_torch(path: Path, entries: tuple[str, ...], formats: dict[str, list[str]]) -> Container:
    if not _is_zip(path):
        raise UserError(
            f"teacher.weights '{path}' is not a whole file of torch.save's zip format (cut off, or older than torch 1.6); copy it again, "
            f"or rewrite an old one: torch.save(torch.load('{path.name}', weights_only=True), 'new.pth')"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        records = _records(path)
    except _DAMAGED as error:
        raise UserError(
            f"teacher.weights '{path}' can't be read as plain tensors, and nothing in it was run ({_reason(error)}); copy it again, or where you trust it "
            "save its state dict as .safetensors with safetensors.torch.save_file"
        ) from None
    tensors = next(
        (
            content[entry]
            for entry in entries
            if isinstance(content, dict) and isinstance(content.get(entry), dict)
        ),
        content,
    )
    if (
        not isinstance(tensors, dict)
        or not tensors
        or not all(isinstance(value, Tensor) and isinstance(name, str) for name, value in tensors.items())
    ):
        found = (
            ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        )
        wanted = " or ".join([*(f"an entry '{entry}'" for entry in entries), "a plain dict of tensors"])
        better = next(
            (
                formats[entry]
                for entry in formats
                if isinstance(content, dict) and isinstance(content.get(entry), dict)
            ),
            None,
        )
        raise UserError(
            f"teacher.weights '{path}' holds {found or 'nothing'}, expected {wanted}; "
            + (f"try teacher.format={' or '.join(better)}" if better else "is teacher.format right?")
        )
    # torch maps the file as a whole: a storage's address says which record it is.
    base = min((_address(value) for value in _tensors_in(content)), default=0) - min(records, default=0)
    places = {}
    for name, value in tensors.items():
        start = 0
        if not _is_plain(value) or (
            value.numel()
            and (
                base % mmap.PAGESIZE
                or records.get(start := _address(value) - base) != value.untyped_storage().nbytes()
            )
        ):
            raise UserError(
                f"teacher.weights '{path}' holds '{name}' in a way that can't be read by places in the file (sparse, quantised or compressed, say); "
                "save its plain tensors as .safetensors with safetensors.torch.save_file"
            )
        places[name] = Place(
            path,
            value.dtype,
            tuple(value.shape),
            value.stride(),
            start + value.storage_offset() * value.dtype.itemsize,
        )
    return Container(path, places)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _reason(error: Exception) -> str:
    """The kind of error and the telling line of what may be a long message of torch's."""
    lines = str(error).splitlines()
    telling = next(
        (line.strip() for line in lines if "Unsupported" in line or "Trying" in line),
        lines[0] if lines else "",
    )
    return f"{type(error).__name__}: {telling[:200]}"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(tensor: Tensor) -> bool:
    """Entries in the file are the tensor's values: no sparse, quantised or conjugated one."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _tensors_in(content: object) -> Iterator[Tensor]:
    """Every tensor of a nested checkpoint that has bytes in the file."""
    if isinstance(content, Tensor):
        if (
            content.layout is torch.strided
            and content.untyped_storage().nbytes()
            and content.device.type == "cpu"
        ):
            yield content
    elif isinstance(content, (dict, list, tuple, set, argparse.Namespace)):
        items = vars(content) if isinstance(content, argparse.Namespace) else content
        for value in items.values() if isinstance(items, dict) else items:
            yield from _tensors_in(value)


def _records(path: Path) -> dict[int, int]:
    """{where the payload of a tensor's record begins: its bytes}, without empty ones; -1 where it is compressed (torch.save never does)."""
    records = {}
    with _open_for_places(path) as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size:
                # A local header ends with the lengths of name and extra field.
                name, extra = struct.unpack("<HH", os.pread(file.fileno(), 4, record.header_offset + 26))
                records[record.header_offset + 30 + name + extra] = (
                    record.file_size if record.compress_type == zipfile.ZIP_STORED else -1
                )
    return records
