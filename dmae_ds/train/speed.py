"""Speed of a step compared with the fastest matrix product that this process gets out of this device.

The shortest possible time of a step is its counted work (plan/work.py) at the measured rate of matrix
products in the same dtype.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.work import PRODUCTS, Work, step_work
from dmae_ds.teacher.frozen import DTYPES

# Rows, columns and inner dimension of the products: larger ones are not faster, and these take a fraction
# of a second.
SIZES = {"cpu": 1024, "cuda": 8192}
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """A rank's work in a step {part: (FLOP, dtype)}, and the rates of matrix products {dtype: FLOP/s}."""

    work: Work
    rates: dict[torch.dtype, float]

    @property
    def flops(self) -> int:
        """FLOP of a step on one rank."""
        return sum(flops for flops, _ in self.work.values())

    @property
    def floor_s(self) -> float:
        """Shortest possible seconds of a step."""
        return sum(flops / self.rates[dtype] for flops, dtype in self.work.values())

    def at(self, step_s: float) -> dict[str, float]:
        """{"tflops": of this rank, "of_peak": share of the fastest} for a step that took step_s seconds."""
        return {"tflops": self.flops / step_s / 1e12, "of_peak": self.floor_s / step_s}


def measure_speed(
    config: RunConfig, geometry: Geometry | None, accumulation: int, device: torch.device
) -> Speed | None:
    """Measure matrix products and count a step's work; None without a geometry (on ranks other than 0).

    Call it on all ranks at once: they share their cores in training.
    """
    dtypes = {PRODUCTS[config.precision]}
    if config.teacher is not None:
        dtypes.add(DTYPES[config.teacher.dtype])
    rates = {dtype: gemm_rate(dtype, device)() for dtype in dtypes}
    return None if geometry is None else Speed(step_work(config, geometry, accumulation), rates)


def gemm_rate(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """Prepare a measurement that can be repeated: FLOP/s of the fastest of a few square matrix products."""
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
    """Wait until a GPU has computed everything that was launched; on a CPU do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
