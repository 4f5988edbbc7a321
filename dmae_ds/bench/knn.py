"""Memory and time of k-NN at ImageNet's size, on random features: `extra_bytes` compared with a measurement.

    dmae-ds bench knn [--train 1281167] [--queries 2048] [--dim 768] [--k 20] [--memory-gib 1]

The peak depends on the queries of a block, not on their number: fewer than 50,000 show it, if they fill a
block.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.knn import knn_predict
from dmae_ds.evaluate.neighbours import TILE, Blocks, choose_blocks, extra_bytes
from dmae_ds.output.units import GIB, MIB

SLACK = 64 * MIB  # buffers of matrix libraries, and freed memory that an allocator keeps


@dataclass(frozen=True)
class Measured:
    """One search: bytes computed and measured, both without the features, and seconds."""

    computed: int
    peak: int
    seconds: float
    device: str


def bench_knn(
    *, num_train: int, num_queries: int, dim: int, k: int, num_classes: int, memory_gib: float
) -> str:
    """Search and vote once; returns the figures, to print.

    Raises UserError off Linux without a GPU, and for too little memory.
    """
    if not torch.cuda.is_available() and sys.platform != "linux":
        raise UserError(
            "bench knn needs a GPU or Linux's /proc/self/status, found neither; run it on Linux or with a GPU"
        )
    sizes = {"num_train": num_train, "dim": dim, "k": k, "num_classes": num_classes}
    blocks = choose_blocks(num_queries=num_queries, memory_gib=memory_gib, **sizes)
    measured = measure(blocks, num_queries=num_queries, **sizes)
    whole = choose_blocks(num_queries=50_000, memory_gib=memory_gib, **sizes)
    features = num_train * dim * 4 / GIB
    is_within = measured.peak <= measured.computed + SLACK
    lines = [
        f"{num_queries:,} queries against {num_train:,} training rows of width {dim} ({features:.2f} GiB), "
        f"k {k}, "
        f"{num_classes:,} classes, on {measured.device}",
        f"blocks of {blocks.queries:,} x {blocks.train:,}: beyond the features "
        f"{measured.computed / GIB:.3f} GiB "
        f"computed, {measured.peak / GIB:.3f} GiB measured; within --memory-gib {memory_gib:g} and 64 MiB: "
        f"{'yes' if is_within else 'NO'}",
        f"{measured.seconds:.1f} s, {num_queries * num_train / measured.seconds / 1e9:.3f} G comparisons/s",
        f"50,000 queries: blocks of {whole.queries:,} x {whole.train:,}, "
        f"{extra_bytes(whole, **sizes) / GIB:.3f} GiB "
        f"computed; at this rate {50_000 / num_queries * measured.seconds / 60:.0f} minutes",
    ]
    return "\n".join(lines)


def measure(
    blocks: Blocks, *, num_train: int, num_queries: int, dim: int, k: int, num_classes: int
) -> Measured:
    """Run the search on random features, on a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    train, queries = (
        torch.empty(num, dim, device=device).normal_(generator=generator) for num in (num_train, num_queries)
    )
    labels = torch.randint(num_classes, (num_train,), generator=generator, device=device)
    options = {"ks": [k], "temperature": 0.07, "num_classes": num_classes}
    few = slice(0, max(k, TILE.queries))
    # Libraries allocate once at their first call.
    knn_predict(train[few], labels[few], queries[few], blocks=TILE, **options)
    before, start = _begin(device), time.perf_counter()
    knn_predict(train, labels, queries, blocks=blocks, **options)
    peak = _peak(device) - before
    computed = extra_bytes(blocks, num_train=num_train, dim=dim, k=k, num_classes=num_classes)
    seconds = time.perf_counter() - start
    is_gpu = device.type == "cuda"
    name = device_name(device) if is_gpu else f"a CPU, {torch.get_num_threads()} threads"
    return Measured(computed, peak, seconds, name)


def _begin(device: torch.device) -> int:
    """Reset the peak; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(field: str) -> int:
    """Bytes of this process, from the kernel's counter."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
