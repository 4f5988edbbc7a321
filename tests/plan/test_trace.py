"""The tracer counts bytes and FLOPs of small networks exactly."""

from __future__ import annotations

import contextlib
from typing import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dmae_ds.plan.fake_cuda import fake_device, obstacle
from dmae_ds.plan.python_engine import PythonEngine
from dmae_ds.plan.trace import trace_inference, trace_training

N, D = 64, 256


def test_a_chain_of_linear_layers_is_counted_exactly():
    with FakeTensorMode():
        layers = nn.Sequential(nn.Linear(D, D, bias=False), nn.ReLU(), nn.Linear(D, D, bias=False))
        x = torch.empty(N, D)
        trace = trace_training(layers, lambda: layers(x).sum())
    product, activation, weight = 2 * N * D * D, 4 * N * D, 4 * D * D
    assert (trace.forward_flops, trace.backward_flops) == (2 * product, 3 * product)  # x needs no gradient
    assert [gradient.numel for gradient in trace.gradients] == [D * D, D * D]
    assert trace.parameters == 2 * D * D
    last, first = trace.gradients
    # ReLU keeps its output, which the last layer needs as well; the first layer's output goes once ReLU is
    # done.
    assert activation + weight <= last.before <= 3 * activation + weight + 8
    assert first.after <= 8 and trace.activations == max(last.before, first.before)


def test_attention_s_products_are_counted():
    heads, tokens, width = 4, 50, 32
    with FakeTensorMode():
        query = torch.empty(2, heads, tokens, width)
        flops, _, kernels = trace_inference(
            lambda: nn.functional.scaled_dot_product_attention(query, query, query)
        )
    assert kernels == 1
    assert flops == 2 * (2 * 2 * heads * tokens * tokens * width)


def test_without_gradients_only_the_working_set_is_alive():
    with FakeTensorMode():
        layers = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(10)))
        x = torch.empty(N, D)
        flops, peak, kernels = trace_inference(lambda: layers(x))
    assert flops == 10 * 2 * N * D * D and peak == 2 * 4 * N * D and kernels == 10


def test_views_take_no_bytes():
    with FakeTensorMode():
        x = torch.empty(N, D)
        _, peak, kernels = trace_inference(lambda: x.view(-1)[5:].unsqueeze(0))
    assert peak == kernels == 0


def network() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Layers with a branch, a custom function and a hook that halves a gradient; and their loss."""
    generator = torch.Generator().manual_seed(1)
    layers = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D), nn.Linear(D, 1))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
    x = torch.randn(N, D, generator=generator)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows):
            return 2 * rows

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    def loss() -> torch.Tensor:
        hidden = Double.apply(layers[0](x))
        branch = hidden.view_as(hidden)
        branch.register_hook(lambda gradient: gradient / 2)
        return (layers[3](layers[2](layers[1](branch))) + layers[3](hidden)).square().mean()

    return layers, loss


def test_gradients_of_the_python_engine_are_those_of_torch_s_bit_for_bit():
    (layers, loss), (others, other_loss) = network(), network()
    loss().backward()
    with PythonEngine().installed():
        other_loss().backward()
    ours, theirs = ([p.grad for p in module.parameters()] for module in (others, layers))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_callbacks_of_a_backward_pass_run_in_the_order_in_which_they_were_queued():
    def run(engine) -> list[int]:
        order = []
        with engine:
            doubled = 2 * torch.ones(2, requires_grad=True)

            def queue(gradient):
                for number in range(3):
                    queued = torch.autograd.Variable._execution_engine.queue_callback
                    queued(lambda number=number: order.append(number))

            doubled.register_hook(queue)
            doubled.sum().backward()
        return order

    assert run(PythonEngine().installed()) == run(contextlib.nullcontext()) == [0, 1, 2]


def test_a_pinned_tensor_on_a_fake_gpu_is_the_tensor_itself():
    if obstacle():
        pytest.skip(f"torch cannot fake CUDA here: {obstacle()}")
    with fake_device("cuda"):
        tensor = torch.ones(2)
        assert tensor.pin_memory() is tensor and tensor.is_pinned_in_fake_cuda


def test_memory_under_the_python_engine_is_that_under_torch_s():
    """It lets go of what a node saved once the node has run; the loss itself, 4 bytes, goes earlier."""

    def trace(engine):
        with FakeTensorMode(), engine:
            blocks = [nn.Sequential(nn.Linear(D, D), nn.GELU()) for _ in range(4)]
            layers, x = nn.Sequential(*blocks, nn.LayerNorm(D)), torch.empty(N, D)
            return trace_training(layers, lambda: layers(x).sum()).gradients

    pairs = zip(trace(contextlib.nullcontext()), trace(PythonEngine().installed()), strict=True)
    for torchs, ours in pairs:
        assert ours.numel == torchs.numel
        assert 0 <= torchs.before - ours.before <= 8 and 0 <= torchs.after - ours.after <= 8
