"""How a device rounds and sums: TF32 for fp32 matrix products on GPUs, and deterministic kernels."""

from __future__ import annotations

import contextlib
import os
from typing import Iterator

import torch


def choose_tf32(tf32: bool, device: torch.device) -> str:
    """Compute fp32 matrix products in TF32 or exactly; returns a text for the summary, "" on CPUs.

    TF32 keeps 10 bits of a factor's mantissa and sums in fp32. On CPUs nothing is touched.
    """
    if device.type != "cuda":
        return ""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    return "fp32 products in TF32" if tf32 else "fp32 products exact (tf32=false)"


@contextlib.contextmanager
def fp32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Compute fp32 matrix products of the block in TF32 or exactly, on a GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_determinism(deterministic: bool) -> str:
    """Choose deterministic kernels or the fastest ones; returns a text for the summary, or "".

    Call it before the first matrix product on a GPU: cuBLAS reads its variable once. An operation without a
    deterministic kernel raises RuntimeError then.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(deterministic)
    # Otherwise new memory is filled with NaN, which costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = deterministic
    return "deterministic kernels" if deterministic else ""
