"""The tracer counts bytes and FLOPs of small networks exactly."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
        flops, _ = trace_inference(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
    assert flops == 2 * (2 * 2 * heads * tokens * tokens * width)


def test_without_gradients_only_the_working_set_is_alive():
    with FakeTensorMode():
        layers = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(10)))
        x = torch.empty(N, D)
        flops, peak = trace_inference(lambda: layers(x))
    assert flops == 10 * 2 * N * D * D and peak == 2 * 4 * N * D


def test_views_take_no_bytes():
    with FakeTensorMode():
        x = torch.empty(N, D)
        _, peak = trace_inference(lambda: x.view(-1)[5:].unsqueeze(0))
    assert peak == 0
