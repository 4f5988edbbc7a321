"""Bytes, memory and seconds of one process that loads one stage of a cut teacher, from Linux's own counters.

First the file is read plainly, as many bytes as the stage needs, one after the other: the least time that
loading can take. The file is removed from the page cache before that and again before the load, so that both
read from the disk.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dmae_ds.output.units import MIB
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.fit import block_of
from dmae_ds.weights.named import open_weights

_BUFFER = 8 * MIB  # bytes of one plain read


@dataclass(frozen=True)
class Load:
    """Bytes and seconds of a load; `floor_*` belong to the plain read of `needed` bytes."""

    needed: int
    read: int  # bytes that the process requested from files
    disk: int  # bytes from the disk in the same time, with the kernel's read-ahead
    kept: int  # bytes of the weights afterwards
    peak: int  # resident memory above that just before, when the network was on the meta device
    load_s: float
    floor_s: float
    floor_disk: int

    @property
    def was_cold(self) -> bool:
        """Whether the file was not in the page cache, so that `disk` and the seconds are meaningful."""
        return self.floor_disk > 0.9 * self.needed


def measure(path: Path, *, name: str, last_block: int, blocks: range) -> Load:
    """Load the embedding and these blocks, counted from 0, of a teacher cut at `last_block`, in fp32.

    Call it first in a process: the peak is the most memory that the process ever had.
    """
    vit = meta_teacher(name, {}, last_block)
    needed = {
        key: tensor
        for key, tensor in vit.state_dict().items()
        if block_of(key) is None or block_of(key) in blocks  # None: no block, as the embedding
    }
    num_bytes = sum(tensor.nbytes for tensor in needed.values())

    evict(path)
    disk, start = _io()["read_bytes"], time.perf_counter()
    _read_plainly(path, num_bytes)
    floor_s, floor_disk = time.perf_counter() - start, _io()["read_bytes"] - disk

    evict(path)
    resident, before, start = _memory("VmRSS"), _io(), time.perf_counter()
    weights = open_weights(path, "mae")
    filled = fill(
        vit,
        weights,
        whole_blocks=last_block,
        may_resize=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
        blocks=blocks,
    )
    load_s, after = time.perf_counter() - start, _io()

    assert num_bytes == weights.num_bytes(list(needed)), f"{path}: not in float32, or not of this network"
    return Load(
        needed=num_bytes,
        read=after["rchar"] - before["rchar"],
        disk=after["read_bytes"] - before["read_bytes"],
        kept=filled.kept_bytes,
        peak=_memory("VmHWM") - resident,
        load_s=load_s,
        floor_s=floor_s,
        floor_disk=floor_disk,
    )


def evict(path: Path) -> None:
    """Remove a file from the page cache, except for pages that a process maps."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _read_plainly(path: Path, num_bytes: int) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while num_bytes > 0:
            num_bytes -= file.readinto(buffer[:num_bytes])


def _io() -> dict[str, int]:
    """Bytes of this process so far: `rchar` were requested, `read_bytes` came from the disk."""
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}


def _memory(field: str) -> int:
    """Resident bytes of this process: VmRSS now, VmHWM at most so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
