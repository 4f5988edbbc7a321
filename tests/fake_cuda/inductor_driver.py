"""Lowers transformer blocks to Triton code for a GPU of compute capability 9.0 that is not here.

Prints a line "RESULT {name: number of Triton kernels}" for each block.
"""

from __future__ import annotations

import contextlib
import json
import re
import types
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from dmae_ds.plan.fake_cuda import CAPABILITY, fake_device
from tests.fake_cuda.networks import on_device

# (embed_dim, heads, tokens, mode)
BLOCKS = {
    "student ViT-B, autocast": (768, 12, 50, "autocast"),
    "student ViT-B, bf16": (768, 12, 50, "bf16"),
    "student ViT-B, fp32": (768, 12, 50, "fp32"),
    "decoder, autocast": (512, 16, 197, "autocast"),
    "teacher ViT-L, bf16": (1024, 16, 50, "inference"),
    "teacher ViT-H, bf16": (1280, 16, 50, "inference"),
}
# An H200, as far as lowering asks for it.
PROPERTIES = types.SimpleNamespace(
    name="H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=140 << 30,
    L2_cache_size=60 << 20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)


class Stop(Exception):
    """Raised where the generated code would be compiled and run."""


def pretend_a_device() -> list[str]:
    """Answer what Inductor and Triton ask of a device; returns the list that takes generated code."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.graph import GraphLowering
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget

    inductor_config.compile_threads = 1
    inductor_config.fx_graph_cache = False
    functorch_config.enable_autograd_cache = False
    torch.cuda.get_device_properties = lambda *_, **__: PROPERTIES
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(lambda *_, **__: PROPERTIES)
        owner.current_device = staticmethod(lambda: 0)
    CudaInterface.get_compute_capability = staticmethod(lambda *_, **__: 10 * CAPABILITY[0] + CAPABILITY[1])
    CudaInterface.is_available = staticmethod(lambda: True)
    CudaInterface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    _triton.has_triton = lambda *_, **__: True

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

        def get_current_device(self):
            return 0

        def get_active_torch_device(self):
            return torch.device("cuda", 0)

        def get_device_interface(self):
            return torch.cuda

    triton.runtime.driver.set_active(Driver())
    codes: list[str] = []

    def keep_code(graph):
        code = graph.codegen()
        text = code[0] if isinstance(code, tuple) else code
        codes.append(getattr(text, "value", text))
        raise Stop

    GraphLowering.compile_to_module = keep_code
    return codes


def lower(dim: int, heads: int, tokens: int, mode: str, codes: list[str]) -> str:
    """The code that Inductor generates for a block: forward and backward, or inference alone."""
    from torch._inductor import virtualized
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    dtype = torch.float32 if mode in ("autocast", "fp32") else torch.bfloat16
    with fake_device("cuda") as device:
        fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        norm = partial(nn.LayerNorm, eps=1e-6)
        # On "meta" first: to draw initial weights on a fake device once asked the driver for a real one.
        block = Block(dim, heads, qkv_bias=True, norm_layer=norm, device="meta", dtype=dtype)
        block = on_device(block, device).requires_grad_(mode != "inference")
        params = dict(block.named_parameters())
        x = torch.empty(64, tokens, dim, device=device, dtype=dtype, requires_grad=mode != "inference")
        autocast = torch.autocast("cuda", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext()

        def forward(params, x):
            with autocast:
                return torch.func.functional_call(block, params, (x,))

        def joint(params, x, gradient):
            y = forward(params, x)
            y.backward(gradient)
            return (y, *(tensor.grad for tensor in [*params.values(), x]))

        if mode == "inference":
            arguments, function = (params, x), lambda params, x: (forward(params, x),)
        else:
            arguments, function = (params, x, torch.empty_like(x, requires_grad=False)), joint
        with torch.no_grad() if mode == "inference" else contextlib.nullcontext():
            graph = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*arguments)
        flat = [tensor.detach() for tensor in tree_leaves(arguments)]
        lowered = make_fx(
            lambda *tensors: Interpreter(graph).run(*tensors),
            decomposition_table=select_decomp_table(),
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*flat)
        codes.clear()
        try:
            with virtualized.V.set_fake_mode(fake_mode):
                compile_fx_inner(lowered, flat)
        except Exception:  # Stop, which Inductor wraps
            if not codes:
                raise
    return codes[-1]


def main() -> None:
    """Lower every block."""
    codes = pretend_a_device()
    for name, shape in BLOCKS.items():
        kernels = re.findall(r"async_compile\.triton\('(\w+)'", lower(*shape, codes))
        print("RESULT " + json.dumps({name: len(kernels)}), flush=True)


if __name__ == "__main__":
    main()
