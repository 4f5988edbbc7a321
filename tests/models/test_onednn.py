"""Linear layers through oneDNN compute what torch's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dmae_ds.models import onednn

pytestmark = pytest.mark.skipif(
    not onednn.onednn_operator(), reason="this torch has no oneDNN linear operator"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24), (2, 1, 1, 24)])
def test_forward_and_gradients_equal_plain_linear(bias, shape):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    other = nn.Sequential(copy.deepcopy(plain))
    assert onednn.use_onednn(other) == 1
    assert list(other.state_dict()) == [f"0.{name}" for name in plain.state_dict()]
    tokens = torch.randn(shape, generator=generator)
    weights = torch.randn(*shape[:-1], 40, generator=generator)
    results = []
    for layer in (plain, other):
        inputs = tokens.clone().requires_grad_()
        outputs = layer(inputs)
        (outputs * weights).sum().backward()
        results.append([outputs, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, mine in zip(*results, strict=True):
        assert mine.shape == expected.shape
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_needed_are_not_computed():
    layer = nn.Sequential(nn.Linear(6, 4))
    onednn.use_onednn(layer)
    layer.requires_grad_(False)
    tokens = torch.randn(5, 6, requires_grad=True)
    layer(tokens).sum().backward()
    assert layer[0].weight.grad is None and layer[0].bias.grad is None and tokens.grad is not None


def test_only_plain_fp32_layers_run_through_onednn():
    class Own(nn.Linear):
        pass

    network = nn.Sequential(nn.Linear(4, 4), Own(4, 4), nn.Linear(4, 4).bfloat16(), nn.Conv2d(3, 4, 2))
    assert onednn.use_onednn(network) == 1
    assert type(network[0]) is onednn.OneDnnLinear and type(network[1]) is Own


def test_the_speed_up_is_a_ratio_of_the_two_ways(monkeypatch):
    """The kernels count time: 6 for torch's forward and backward together, 1 for each oneDNN product."""
    clock = [0]
    linear, product = nn.functional.linear, onednn.product

    def plain(*arguments):
        clock[0] += 6
        return linear(*arguments)

    def other(*arguments):
        clock[0] += 1
        return product(*arguments)

    monkeypatch.setattr(onednn.nn.functional, "linear", plain)
    monkeypatch.setattr(onednn, "product", other)
    monkeypatch.setattr(onednn.time, "perf_counter", lambda: clock[0])
    assert onednn.onednn_speedup() == 6 / 3
