"""The matrix products of a step, by part, as torch's own FLOP counter found them on fake tensors (trace.py)."""

from __future__ import annotations

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.plan.geometry import Geometry
from dmae_ds.teacher.frozen import DTYPES

PRODUCTS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}  # precision -> dtype of the products

Work = dict[str, tuple[int, torch.dtype]]


def step_work(config: RunConfig, geometry: Geometry, accumulation: int) -> Work:
    """{part: (FLOP of a rank's step, dtype of its products)}. A pipeline's stages have as much to do each as a replicated teacher."""
    products = PRODUCTS[config.precision]
    work = {
        "forward": (geometry.student.forward_flops, products),
        "backward": (geometry.student.backward_flops, products),
    }
    if geometry.teacher is not None:
        work["teacher"] = (geometry.teacher.flops, DTYPES[config.teacher.dtype])
    if geometry.ema is not None:
        work["ema"] = (geometry.ema.flops, products)
    return {part: (flops * accumulation, dtype) for part, (flops, dtype) in work.items()}
