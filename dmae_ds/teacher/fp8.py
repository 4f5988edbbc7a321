"""A frozen teacher's matrix products in float8 (e4m3), by torchao.

Weights are rounded once, with one scale a row; activations are rounded as they are computed. For GPUs that
multiply float8 (compute capability 8.9 and up: Ada, Hopper, Blackwell). The change of the features is
measured on the fixed input of identity.py at every start, and printed. Not run on such a GPU yet: written
from torchao 0.18's documentation and tried with its weight-only quantisation on a CPU.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Callable

import torch
from torch import nn

from dmae_ds.errors import UserError

if TYPE_CHECKING:
    from dmae_ds.teacher.frozen import FrozenTeacher

CAPABILITY = (8, 9)


def check_fp8(device: torch.device) -> None:
    """Raise UserError where teacher.dtype=fp8 can't run: no such hardware, or no torchao."""
    if device.type != "cuda":
        raise UserError(
            "teacher.dtype fp8 needs a GPU that multiplies float8, and this rank has none; use "
            "teacher.dtype=bf16"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"teacher.dtype fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more, "
            f"found {name} with {capability[0]}.{capability[1]}; use teacher.dtype=bf16"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            "teacher.dtype fp8 needs torchao, which is not installed; pip install torchao, or use "
            "teacher.dtype=bf16"
        )


def quantize_blocks(blocks: nn.ModuleList) -> None:
    """Turn every linear layer of these blocks into a float8 one, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(
        blocks, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    )


def to_fp8(teacher: FrozenTeacher, quantize: Callable[[nn.ModuleList], None] = quantize_blocks) -> str:
    """Quantise a teacher's blocks. Returns one line about how much features of the fixed input changed."""
    before = teacher.probe().features
    quantize(teacher.vit.blocks)
    after = teacher.probe().features
    errors = {
        number: ((after[number] - before[number]).norm() / before[number].norm()).item()
        for number in sorted(teacher.tapped)
    }
    changes = ", ".join(f"{error:.2%} at block {number}" for number, error in errors.items())
    return f"float8 changes features of a fixed input by {changes}"
