"""How fast a step is beside the fastest matrix product that this process gets out of this device.

The floor of a step is its counted work (plan/work.py) at the measured rate of matrix products in the same dtype.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

import torch

from dmae_ds.plan.work import Work

SIZES = {
    "cpu": 1024,
    "cuda": 8192,
}  # rows = columns = inner dimension: the rate grows no more, and a fraction of a second
REPEATS = 3


def gemm_rate(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A measurement to be taken as often as one likes: FLOP/s of the fastest of a few square products, in this dtype with these threads."""
    size = SIZES[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def measure() -> float:
        seconds = []
        for _ in range(REPEATS):
            wait_for(device)
            since = time.perf_counter()
            torch.mm(left, right, out=out)
            wait_for(device)
            seconds.append(time.perf_counter() - since)
        return 2 * size**3 / min(seconds)

    return measure


def wait_for(device: torch.device) -> None:
    """Launched is not done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Speed:
    """A rank's work of a step, {part: (FLOP, dtype)}, and the rates of matrix products here, {dtype: FLOP/s}."""

    work: Work
    rates: dict[torch.dtype, float]

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.work.values())

    @property
    def floor_s(self) -> float:
        """The shortest that a step could take."""
        return sum(flops / self.rates[dtype] for flops, dtype in self.work.values())

    def at(self, step_s: float) -> dict[str, float]:
        """{"tflops": of this rank, "of_peak": share of the fastest} for a step that took so many seconds."""
        return {"tflops": self.flops / step_s / 1e12, "of_peak": self.floor_s / step_s}
