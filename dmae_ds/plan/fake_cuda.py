"""Fake CUDA: networks run on tensors that say "cuda" and hold nothing, on a machine without a GPU.

torch's FakeTensorMode gives shapes, dtypes and devices. Four things a GPU has are missing without a driver,
and put in place here: CUDA's autocast, which turns itself off; bf16; the fused attention that a GPU of
compute capability 9.0 takes; and backward (python_engine.py). It tells which kernels a step launches, in
which dtypes and with how many live bytes; nothing of their speed, of streams, or of values.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function

from dmae_ds.plan.python_engine import PythonEngine, patched

CAPABILITY = (9, 0)


@contextlib.contextmanager
def fake_device(device_type: str) -> Iterator[torch.device]:
    """Make every tensor of the block a fake one; yields the device to put them on.

    device_type: "cpu", or "cuda" as a GPU of compute capability 9.0, whether or not one is here
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if device_type == "cuda":
            stack.enter_context(_as_on_a_gpu())
        yield _device(device_type)


@functools.cache
def obstacle() -> str:
    """Why this torch cannot fake CUDA here, in its own words; empty where it can.

    Before 2.10 it asks for a device where there is none.
    """
    try:
        with fake_device("cuda") as device:
            weight = torch.nn.Parameter(torch.empty(2, device=device))
            (2 * weight).sum().backward()
    except (RuntimeError, AssertionError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def _device(device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    # Of the ranks of a node, each stays away from the others' GPUs.
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    return torch.device(device_type, index)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    replaced = [
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_device_capability", lambda *_, **__: CAPABILITY),
        (functional, "scaled_dot_product_attention", _fused_attention),
        (torch.Tensor, "pin_memory", _pinned),
    ]
    with patched(replaced), PythonEngine().installed():
        yield


def _pinned(tensor: Tensor, *_, **__) -> Tensor:
    """The tensor itself, marked: a fake one has no memory to pin."""
    tensor.is_pinned_in_fake_cuda = True
    return tensor


_attention = functional.scaled_dot_product_attention


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs,
) -> Tensor:
    """Attention by the kernel that a GPU takes: flash for 16 bits, memory-efficient for fp32.

    Without a device torch takes the unfused path, which keeps all attention weights.
    """
    if has_torch_function((query, key, value)):  # a function mode, which may take the arguments for itself
        args = (query, key, value, attn_mask, dropout_p, is_causal, scale)
        return handle_torch_function(_fused_attention, args[:3], *args, **kwargs)
    if query.device.type != "cuda" or attn_mask is not None or kwargs.get("enable_gqa"):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs)
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}: they must be equal")
    if query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    with_gradient = query.requires_grad or key.requires_grad or value.requires_grad
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, None, with_gradient, dropout_p, is_causal, scale=scale)[0]
