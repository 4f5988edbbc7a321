"""Tensors of a file by their places in it, of which only those that are asked for are read.

A container knows every tensor's name, shape, dtype and place from the file's header alone. A tensor is read
by its place into memory of its own: exactly its bytes. Mapping the file instead was measured (BENCHMARKS.md):
it reads more bytes from the disk, because of the kernel's read-ahead, and holds every byte twice while it is
copied.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.output.safetensors_header import open_unbuffered
from dmae_ds.weights.label import WEIGHTS, Label

_OWN_PAGES = 1 << 20  # bytes; larger tensors get pages of their own
_READ_AT_ONCE = 1 << 26  # bytes


@dataclass(frozen=True)
class Place:
    """One tensor in a file: `offset` in bytes, `strides` in entries.

    problem: why its values can't be read (a dtype that torch lacks, a sparse tensor); empty where they can
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    problem: str = ""

    @property
    def num_entries(self) -> int:
        """Number of entries from the first to the last, whatever the strides."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def num_bytes(self) -> int:
        """Number of bytes from the first entry to the last."""
        return self.num_entries * self.dtype.itemsize


class Container(Mapping):
    """A weights file as {name in the file: tensor}, each read when it is asked for.

    places: {name: where it is}; metadata: the file's own text entries (safetensors)
    absent: files that an index names and that are not on this machine; a rank may do without those whose
    tensors it doesn't need
    entries: names of a .pth's top level that hold other names
    root, note: what stood in front of the names in the file, and what was not read for it (roots.py)
    """

    def __init__(
        self,
        path: Path,
        places: dict[str, Place],
        metadata: dict[str, str] | None = None,
        *,
        label: Label = WEIGHTS,
    ):
        self.path = path
        self.places = places
        self.metadata = metadata or {}
        self.label = label
        self.absent: list[str] = []
        self.entries: frozenset[str] = frozenset()
        self.root = self.note = ""
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's own would read the tensor

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor into memory of its own: contiguous, in the file's dtype."""
        place = self.places[name]
        if place.problem:
            raise UserError(
                f"{self.label.weights} '{place.path}': '{name}' {place.problem}; save the file again with it "
                "as a plain tensor of float32, float16 or bfloat16"
            )
        flat = _allocate(place)
        if place.num_bytes:
            self.bytes_read += _read_into(place, memoryview(flat.view(torch.uint8).numpy()), self.label)
        return flat.as_strided(place.shape, place.strides).contiguous()

    def with_places(self, places: dict[str, Place]) -> Container:
        """The same file with other names or fewer of them."""
        changed = Container(self.path, places, self.metadata, label=self.label)
        changed.absent, changed.entries = self.absent, self.entries
        return changed

    def like(self, name: str) -> Tensor:
        """Return the tensor on the meta device: its shape and dtype, without reading it."""
        return torch.empty(self.places[name].shape, dtype=self.places[name].dtype, device="meta")


def _allocate(place: Place) -> Tensor:
    """Memory for one tensor, [num_entries].

    Large tensors get pages of their own, which go back to the system when only a converted copy is kept. From
    malloc, a ViT-B read in fp32 and kept in bf16 held 1.6 times its bytes, in freed holes between what was
    kept.
    """
    if place.num_bytes < _OWN_PAGES:
        return torch.empty(place.num_entries, dtype=place.dtype)
    return torch.frombuffer(mmap.mmap(-1, place.num_bytes), dtype=place.dtype)


def _read_into(place: Place, buffer: memoryview, label: Label) -> int:
    done = 0
    with open_unbuffered(place.path) as file:
        while done < len(buffer):
            window = buffer[done : done + _READ_AT_ONCE]
            count = os.preadv(file.fileno(), [window], place.offset + done)
            if count == 0:
                end = place.offset + done
                raise UserError(
                    f"{label.weights} '{place.path}' ends at byte {end}, inside a tensor; copy it again"
                )
            done += count
    return done


def describe_error(error: Exception) -> str:
    """Return an error's kind and the line of its message that explains it (torch's messages can be long)."""
    lines = str(error).splitlines()
    first = lines[0] if lines else ""
    telling = next((line.strip() for line in lines if "Unsupported" in line or "Trying" in line), first)
    return f"{type(error).__name__}: {telling[:200]}"
