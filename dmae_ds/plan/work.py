"""FLOPs of a step's matrix products by part, counted by torch on fake tensors (trace.py)."""

from __future__ import annotations

import torch

from dmae_ds.config.run import RunConfig
from dmae_ds.plan.geometry import Geometry
from dmae_ds.teacher.frozen import DTYPES

# Dtype of the matrix products by precision.
PRODUCTS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16_autocast": torch.bfloat16,
    "fp16": torch.float16,
}

TEACHER_PRODUCTS = DTYPES | {"fp8": torch.float8_e4m3fn}

Work = dict[str, tuple[int, torch.dtype]]


def step_work(config: RunConfig, geometry: Geometry, accumulation: int) -> Work:
    """Count the work of a rank's step: {part: (FLOP, dtype of its matrix products)}.

    In a pipeline every stage does as much work as a replicated teacher.
    """
    products = PRODUCTS[config.precision]
    work = {
        "forward": (geometry.student.forward_flops, products),
        "backward": (geometry.student.backward_flops, products),
    }
    if geometry.teacher is not None:
        work["teacher"] = (geometry.teacher.flops, TEACHER_PRODUCTS[config.teacher.dtype])
    if geometry.ema is not None:
        work["ema"] = (geometry.ema.flops, products)
    return {part: (flops * accumulation, dtype) for part, (flops, dtype) in work.items()}
