"""What one process takes to load one stage of a cut teacher, by the kernel's own counters (Linux alone has them).

The file is first read plainly, as many bytes as the stage needs, one after the other: the floor of the seconds. The
page cache lets go of it before that and once more before the load, so both meet the disk.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.fit import block_of
from dmae_ds.weights.named import open_weights

_BUFFER = 8 << 20  # bytes a plain read asks for


@dataclass(frozen=True)
class Load:
    """Bytes and seconds. `floor_*`: the plain read of `needed` bytes.

    read: what the process asked of files; disk: what came from the disk meanwhile, the kernel's read-ahead included
    kept: of the weights; peak: resident memory above what was resident just before, with the network on the meta device
    """

    needed: int
    read: int
    disk: int
    kept: int
    peak: int
    load_s: float
    floor_s: float
    floor_disk: int

    @property
    def was_cold(self) -> bool:
        """Whether the page cache had let go of the file, so that `disk` and the seconds mean something."""
        return self.floor_disk > 0.9 * self.needed


def measure(path: Path, *, name: str, last_block: int, blocks: range) -> Load:
    """Load the embedding and these blocks, counted from 0, of a teacher cut at `last_block`, in fp32.

    To be the first thing that a process does: the most memory that it ever held is the peak.
    """
    vit = meta_teacher(name, {}, last_block)
    needed = {
        key: tensor
        for key, tensor in vit.state_dict().items()
        if block_of(key) is None or block_of(key) in blocks
    }
    num_bytes = sum(tensor.nbytes for tensor in needed.values())

    evict(path)
    disk, start = _io()["read_bytes"], time.perf_counter()
    _read_plainly(path, num_bytes)
    floor_s, floor_disk = time.perf_counter() - start, _io()["read_bytes"] - disk

    evict(path)
    resident, before, start = _memory("VmRSS"), _io(), time.perf_counter()
    weights = open_weights(path, "mae")
    parts = fill(
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
        kept=parts.kept_bytes,
        peak=_memory("VmHWM") - resident,
        load_s=load_s,
        floor_s=floor_s,
        floor_disk=floor_disk,
    )


def evict(path: Path) -> None:
    """Ask the page cache to let go of a file: pages that are on the disk go, where nobody maps them."""
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
    """Bytes of this process so far: `rchar` is what it asked for, `read_bytes` what the disk gave."""
    with open("/proc/self/io") as file:
        return {key: int(value) for key, value in (line.split(":") for line in file)}


def _memory(field: str) -> int:
    """VmRSS, resident now, or VmHWM, the most that ever was; bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
