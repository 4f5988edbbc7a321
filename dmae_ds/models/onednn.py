"""Linear layers of fp32 networks through oneDNN, on CPUs where that is faster than what torch takes.

torch hands fp32 matrix products to MKL, which on some processors reaches half of oneDNN's rate (measured on an AMD core: 98
and 200 GFLOP/s; on an Intel Xeon both reach 115). Its switches (torch.backends.mkldnn) choose oneDNN for lower precision
alone, so the operator that torch's own compiler emits is called here: private, hence looked for, tried and timed on a
layer's forward and backward before it is used. The result differs from MKL's by rounding, as two MKLs differ.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

ROWS, WIDTH, HIDDEN = 400, 768, 3072  # a ViT-B's MLP on 8 pictures of 49 visible patches
FASTER = 1.2  # below, it may be noise
_REPEATS = 3


class OneDnnLinear(nn.Linear):
    """nn.Linear with another kernel."""

    def forward(self, tokens: Tensor) -> Tensor:
        # [..., in] -> [rows, in] -> [..., out]
        return _Product.apply(tokens.flatten(0, -2), self.weight, self.bias).unflatten(0, tokens.shape[:-1])


def use_onednn(network: nn.Module) -> int:
    """Let every plain fp32 linear layer under a network run through oneDNN; returns how many there are. Names stay."""
    layers = [
        module
        for module in network.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    ]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


def onednn_operator() -> bool:
    """Whether this torch has it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_speedup() -> float:
    """How many times faster a layer's forward and backward are through oneDNN than as torch does them, with these threads."""
    tokens, layer = torch.randn(ROWS, WIDTH, requires_grad=True), nn.Linear(WIDTH, HIDDEN)
    other = OneDnnLinear(WIDTH, HIDDEN)
    other.load_state_dict(layer.state_dict())
    seconds: dict[nn.Module, list[float]] = {layer: [], other: []}
    for _ in range(1 + _REPEATS):  # the first is a warm-up, and the fastest is what counts
        for module, found in seconds.items():
            since = time.perf_counter()
            module(tokens).sum().backward()
            found.append(time.perf_counter() - since)
    return min(seconds[layer]) / min(seconds[other])


class _Product(torch.autograd.Function):
    """tokens [rows, in] @ weight [out, in]^T + bias."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return _product(tokens, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tokens, weight = ctx.saved_tensors
        wants_tokens, wants_weight, wants_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            _product(gradient, weight.t()) if wants_tokens else None,
            _product(gradient.t(), tokens.t()) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left [m, k] @ right [n, k]^T + bias [n]."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
