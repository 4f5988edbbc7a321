"""Linear layers of fp32 networks through oneDNN, on CPUs where that is faster than torch's own choice.

torch gives fp32 matrix products to MKL, which on some processors reaches half of oneDNN's rate (measured: 98
and 200 GFLOP/s on an AMD core; on an Intel Xeon both reach 115). Its switches (torch.backends.mkldnn) choose
oneDNN for lower precision only, so this file calls the operator that torch's compiler emits. It is private,
and is therefore looked for, tried and timed on a layer's forward and backward before it is used. The result
differs from MKL's by rounding, as between two versions of MKL.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

ROWS, WIDTH, HIDDEN = 400, 768, 3072  # a ViT-B's MLP on 8 images of 49 visible patches
FASTER = 1.2  # a smaller speed-up may be noise
_REPEATS = 3


class OneDnnLinear(nn.Linear):
    """nn.Linear with oneDNN's kernel."""

    def forward(self, tokens: Tensor) -> Tensor:
        # [..., in] -> [rows, in] -> [..., out]
        return _Product.apply(tokens.flatten(0, -2), self.weight, self.bias).unflatten(0, tokens.shape[:-1])


def use_onednn(network: nn.Module) -> int:
    """Let every plain fp32 linear layer of a network run through oneDNN; parameters keep their names.

    Returns the number of layers.
    """
    layers = [
        module
        for module in network.modules()
        if type(module) is nn.Linear and module.weight.dtype == torch.float32
    ]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


def onednn_operator() -> bool:
    """Whether this torch has oneDNN's linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_speedup() -> float:
    """Speed-up of a layer's forward and backward by oneDNN over torch's own choice, with these threads."""
    tokens = torch.randn(ROWS, WIDTH, requires_grad=True)
    layer = nn.Linear(WIDTH, HIDDEN)
    other = OneDnnLinear(WIDTH, HIDDEN)
    other.load_state_dict(layer.state_dict())
    seconds: dict[nn.Module, list[float]] = {layer: [], other: []}
    for _ in range(1 + _REPEATS):  # the first is a warm-up, and the fastest counts
        for module, durations in seconds.items():
            since = time.perf_counter()
            module(tokens).sum().backward()
            durations.append(time.perf_counter() - since)
    return min(seconds[layer]) / min(seconds[other])


class _Product(torch.autograd.Function):
    """The product tokens [rows, in] @ weight [out, in]^T + bias, with its gradients."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return product(tokens, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        tokens, weight = ctx.saved_tensors
        wants_tokens, wants_weight, wants_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        return (
            product(gradient, weight.t()) if wants_tokens else None,
            product(gradient.t(), tokens.t()) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by oneDNN: left [m, k] @ right [n, k]^T + bias [n] -> [m, n], in fp32 on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
