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

    The part of the one teacher is "teacher", that of one of several "teacher dino".

    In a pipeline every stage does as much work as a replicated teacher.
    """
    of_student = PRODUCTS[config.precision]
    work = {
        "forward": (geometry.student.forward_flops, of_student),
        "backward": (geometry.student.backward_flops, of_student),
    }
    for name, teacher in geometry.teachers.items():
        products = TEACHER_PRODUCTS[config.named_teachers()[name].dtype]
        work[f"teacher {name}".strip()] = (teacher.flops, products)
    if geometry.ema is not None:
        work["ema"] = (geometry.ema.flops, of_student)
    return {part: (flops * accumulation, dtype) for part, (flops, dtype) in work.items()}
