"""FLOPs and live bytes of a forward and backward pass, found on fake tensors in seconds.

torch's FlopCounterMode counts matrix products and attention. `_Live` counts the bytes of every storage from
the operator that makes it until Python and autograd release it. Scratch memory inside kernels is not counted.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass
from typing import Callable, Iterable

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

# The CPU's fused attention, which FlopCounterMode doesn't know before torch 2.13; fake CPU tensors use no
# other kernel.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}


@dataclass(frozen=True)
class Gradient:
    """A parameter's gradient, and the bytes that are alive when it is ready."""

    numel: int
    is_matrix: bool
    before: int  # most bytes of activations since the previous gradient, this one included
    after: int  # bytes once it is removed


@dataclass(frozen=True)
class Trace:
    """Forward and backward of one micro-batch."""

    forward_flops: int
    backward_flops: int
    gradients: tuple[Gradient, ...]  # in the order in which backward makes them
    forward_kernels: int = 0
    backward_kernels: int = 0

    def __add__(self, other: Trace) -> Trace:
        """Both, one after the other: the first one's activations are gone when the second begins."""
        return Trace(
            self.forward_flops + other.forward_flops,
            self.backward_flops + other.backward_flops,
            self.gradients + other.gradients,
            self.forward_kernels + other.forward_kernels,
            self.backward_kernels + other.backward_kernels,
        )

    @property
    def parameters(self) -> int:
        return sum(gradient.numel for gradient in self.gradients)

    @property
    def activations(self) -> int:
        """Most bytes of activations that are alive at one moment."""
        return max(gradient.before for gradient in self.gradients)


def trace_training(objective: nn.Module, forward: Callable[[], torch.Tensor]) -> Trace:
    """Run `forward`, which returns the loss, and backward once, on fake tensors of the active FakeTensorMode.

    Every parameter must get a gradient: an objective trains nothing that it doesn't use.
    """
    live, gradients = _Live(), []

    def ready(parameter: nn.Parameter) -> None:
        parameter.grad = None
        gradients.append(Gradient(parameter.numel(), parameter.ndim >= 2, live.peak, live.now))
        live.peak = live.now

    handles = [parameter.register_post_accumulate_grad_hook(ready) for parameter in objective.parameters()]
    with live:
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as forward_flops:
            loss = forward()
        forward_kernels = live.kernels
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as backward_flops:
            loss.backward()
    for handle in handles:
        handle.remove()
    assert len(gradients) == len(handles), f"{len(handles) - len(gradients)} parameters without a gradient"
    return Trace(
        forward_flops.get_total_flops(),
        backward_flops.get_total_flops(),
        tuple(gradients),
        forward_kernels,
        live.kernels - forward_kernels,
    )


def trace_inference(forward: Callable[[], object]) -> tuple[int, int, int]:
    """Run a pass without gradients on fake tensors.

    Returns (FLOPs, most bytes alive at one moment, kernels).
    """
    live = _Live()
    with torch.no_grad(), live, FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops:
        forward()
    return flops.get_total_flops(), live.peak, live.kernels


def launches_kernel(function, inputs: set[int], outputs: Iterable[torch.Tensor]) -> bool:
    """Whether an operator computes something: it changes a tensor, or fills one that it makes.

    inputs: addresses (`_cdata`) of the storages of its arguments
    """
    if "empty" in function.__name__:
        return False
    if function._schema.is_mutable:
        return not function.__name__.startswith(("detach_", "set_", "resize_"))
    return any(tensor.untyped_storage()._cdata not in inputs for tensor in outputs)


class _OneModule(contextlib.nullcontext):
    """Stands for torch's ModuleTracker, and finds nothing."""

    parents = ("Global",)


class FlopCounterMode(flop_counter.FlopCounterMode):
    """torch's counter of a whole pass, without its parts.

    The hooks that tell modules apart would keep alive what checkpointed blocks compute a second time.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mod_tracker = _OneModule()


class _Live(TorchDispatchMode):
    """Counts kernels, and bytes of the storages that operators make.

    Bytes: `now`, and their `peak` since it was last reset.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.kernels = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {
            tensor.untyped_storage()._cdata
            for tensor in tree_iter((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        outputs = [tensor for tensor in tree_iter(out) if isinstance(tensor, torch.Tensor)]
        self.kernels += launches_kernel(function, inputs, outputs)
        for tensor in outputs:
            self._follow(tensor.untyped_storage(), inputs)
        return out

    def _follow(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs:  # an alias
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes
