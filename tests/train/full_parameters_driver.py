"""Compare full weights under every ZeRO stage with DeepSpeed's own; started by test_full_parameters.py.

Prints "SAME stage precision collectives" for each: the number of collectives in buckets of 40 entries.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import distributed, nn

from dmae_ds.config.deepspeed import load_deepspeed
from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import whole_lines, world_from_env
from dmae_ds.train import full_parameters
from dmae_ds.train.engine import Engine

CASES = [(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")]


class Network(nn.Module):
    """68 weights whose sizes two ranks do not divide; `frozen` is not trained."""

    def __init__(self):
        super().__init__()
        self.lr_scales = {}
        self.first, self.second, self.frozen = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, batch, features):
        return {"loss": self.second(self.first(batch)).square().mean()}


def reference(engine: Engine, parameter: nn.Parameter, precision: str) -> torch.Tensor:
    """A full weight by DeepSpeed's functions, one parameter at a time."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter) if precision != "fp32" else None
    if master is not None:
        return master.detach().float().clone()
    with zero.GatheredParameters([parameter], enabled=engine.stage == 3):
        return parameter.detach().float().clone()


def check(stage: int, precision: str, device: torch.device, calls: Counter) -> None:
    torch.manual_seed(0)
    network = Network()
    groups = [{"params": [*network.first.parameters()]}, {"params": [*network.second.parameters()]}]
    config = load_deepspeed(
        f"zero{stage}", micro_batch=2, accumulation=1, world_size=2, clip_grad=0.0, precision=precision
    )
    engine = Engine(network, torch.optim.AdamW(groups, lr=1e-2), config, device)
    for step in range(3):
        batch = torch.randn(2, 5, generator=torch.Generator().manual_seed(step + 10 * distributed.get_rank()))
        engine.train_micro_batch(batch.to(network.first.weight.dtype), {})
    expected = {name: reference(engine, value, precision) for name, value in network.named_parameters()}
    calls.clear()
    found = {name: value.clone() for name, value in engine.full_parameters()}
    num_calls = calls.total()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) and found[name].dtype == torch.float32, (
            stage,
            precision,
            name,
        )
    part = [name for name, _ in engine.full_parameters(("second",))]
    assert part == ["second.weight", "second.bias"]
    print("SAME", stage, precision, num_calls, flush=True)


def main() -> None:
    whole_lines()
    device = process_group.start(world_from_env())
    full_parameters.BUCKET = 40
    calls: Counter = Counter()
    for name in ("all_reduce", "all_gather_into_tensor"):
        real = getattr(distributed, name)

        def counted(*args, name=name, real=real, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        setattr(distributed, name, counted)
    for stage, precision in CASES:
        if (stage, precision) != (0, "bf16"):
            check(stage, precision, device, calls)
    process_group.stop()


main()
