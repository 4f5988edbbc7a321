"""Speed of a step compared with the fastest matrix product that this process gets out of this device.

The shortest possible time of a step is its counted work (plan/work.py) at the measured rate of matrix
products in the same dtype, by the fastest of all kernels that steps use: on some processors torch's own
choice in fp32 reaches half of what the linear layers get from oneDNN (models/onednn.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from dmae_ds.config.run import RunConfig
from dmae_ds.models.onednn import onednn_operator
from dmae_ds.models.onednn import product as onednn_product
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.work import PRODUCTS, TEACHER_PRODUCTS, Work, step_work

# Rows, inner dimension and columns of the products: larger ones are not faster, and these take a fraction of
# a second. On a CPU also a small batch in the MLP of a ViT-B.
SHAPES = {"cpu": ((1024, 1024, 1024), (400, 3072, 768)), "cuda": ((8192, 8192, 8192),)}
REPEATS = 3
Product = Callable[[Tensor, Tensor], Tensor]


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
    dtypes |= {TEACHER_PRODUCTS[teacher.dtype] for teacher in config.named_teachers().values()}
    rates = {dtype: Yardstick(dtype, device).measure() for dtype in dtypes}
    return None if geometry is None else Speed(step_work(config, geometry, accumulation), rates)


class Yardstick:
    """The fastest matrix product in a dtype that this process has got out of this device so far.

    Every kernel by which a step may multiply takes its turn (`product_kernels`), on every shape of SHAPES.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.device = device
        self.rate, self.kernel = 0.0, ""  # FLOP/s, and what reached them
        self._products = []
        for rows, inner, columns in SHAPES[device.type]:
            # [m, k], [n, k] -> [m, n]
            left, right = (torch.randn(num, inner, device=device).to(dtype) for num in (rows, columns))
            for name, multiply in product_kernels(dtype, device).items():
                text = f"{name} {rows} x {inner} x {columns}"
                self._products.append((text, 2 * rows * inner * columns, multiply, left, right))

    def measure(self) -> float:
        """Let every kernel multiply a few times; returns the highest rate since the start, in FLOP/s."""
        for _ in range(REPEATS):
            for text, flops, multiply, left, right in self._products:
                wait_for(self.device)
                since = time.perf_counter()
                multiply(left, right)
                wait_for(self.device)
                rate = flops / (time.perf_counter() - since)
                if rate > self.rate:
                    self.rate, self.kernel = rate, text
        return self.rate


def product_kernels(dtype: torch.dtype, device: torch.device) -> dict[str, Product]:
    """Kernels that a step multiplies with: {name: left [m, k], right [n, k] -> left @ right^T}."""
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)  # the scale of both
        options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        return {"torch._scaled_mm": lambda left, right: torch._scaled_mm(left, right.t(), **options)}
    kernels = {"torch.mm": lambda left, right: torch.mm(left, right.t()), "torch's linear": linear}
    if dtype == torch.float32 and device.type == "cpu" and onednn_operator():
        kernels["oneDNN's linear"] = onednn_product
    return kernels


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has computed everything that was launched; on a CPU do nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
