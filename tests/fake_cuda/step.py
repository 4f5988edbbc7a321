"""A step of a recipe on one fake GPU, without DeepSpeed: what is prepared, computed, updated and measured."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from dmae_ds.distributed import collectives
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress
from dmae_ds.plan.fake_cuda import fake_device
from dmae_ds.plan.geometry import WEIGHTS
from dmae_ds.train.collapse import CollapseMonitors
from dmae_ds.train.optim import build_optimizer
from tests.fake_cuda.networks import Networks, build_meta, on_device, place
from tests.fake_cuda.watch import Watch

# What fake tensors raise where a value is read, a shape depends on values, or devices differ.
RAISED = (DataDependentOutputException, DynamicOutputShapeException, RuntimeError)


@dataclass(frozen=True)
class Report:
    """What was seen in the last step: findings of the watch and of checks, and the number of kernels."""

    findings: dict[str, int]
    host_operators: dict[str, int]
    kernels: int


def watch_step(
    recipe: str, *overrides: str, precision: str = "fp32", micro_batch: int = 8, steps: int = 2
) -> Report:
    """Build a recipe's networks on a fake GPU and watch the last of so many steps."""
    meta = build_meta(recipe, f"precision={precision}", *overrides)
    ema = None if meta.objective.ema is None else EmaModule(meta.objective)
    meta.objective.to(WEIGHTS[precision])
    watch = Watch()
    with collectives.alone(), fake_device("cuda") as device:
        networks = place(meta, device)
        if ema is not None:
            on_device(ema, device)
            ema.state = {
                name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                for name, tensor in ema.state.items()
            }
        step = _Step(networks, ema, precision)
        for number in range(steps):
            watch = Watch()
            batch = networks.batch(micro_batch)
            try:
                with watch.watching():
                    step.take(batch, number)
            except RAISED as error:
                watch.findings[f"raised: {type(error).__name__}: {str(error).splitlines()[0][:200]}"] += 1
                break
        findings = {**watch.findings, **watch.waits, **misplaced(step.optimizer, networks.objective)}
    return Report(findings, dict(watch.host_operators), watch.num_kernels)


def misplaced(optimizer: torch.optim.Optimizer, objective: torch.nn.Module) -> dict[str, int]:
    """Findings about tensors that are not where their parameter is: gradients and optimiser state.

    A fused optimiser on a GPU refuses them; fake tensors let them pass.
    """
    found = {}
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device != parameter.device:
                found[f"optimiser state {name} on {value.device}"] = 1
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None and parameter.grad.device != parameter.device:
            found[f"gradient of {name} on {parameter.grad.device}"] = 1
    return found


class _Step:
    """A recipe's step; `collapse` watches the student, as in logged steps."""

    def __init__(self, networks: Networks, ema: EmaModule | None, precision: str):
        self.networks, self.ema, self.precision = networks, ema, precision
        members = networks.objective.members()
        self.collapse = CollapseMonitors({name: member.student for name, member in members.items()})
        self.collapse.active = True
        self.optimizer = build_optimizer(networks.objective, networks.config.optim)

    def take(self, batch, number: int) -> None:
        networks, objective = self.networks, self.networks.objective
        masked = objective.prepare(batch, networks.normalize)
        objective.start_step(Progress(number, 10, 0.0, networks.config.optim.epochs))
        ((_, _, features),) = networks.teacher.stream([(batch, masked)])
        if self.ema is not None:
            features = {
                **features,
                **ema_features(objective, self.ema, masked, precision=self.precision),
            }
        autocast = contextlib.nullcontext()
        if self.precision == "bf16_autocast":
            autocast = torch.autocast(networks.device.type, torch.bfloat16)
        with autocast:
            losses = objective(masked, features)
        losses["loss"].backward()
        shares = objective.gradient_shares()
        torch.stack([value.detach().float() for value in {**losses, **shares}.values()])
        without = [name for name, parameter in objective.named_parameters() if parameter.grad is None]
        assert not without, f"no gradient: {without[:5]}"
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self._update_ema()
        numbers = self.collapse.measure()
        assert {value.device for value in numbers.values()} <= {networks.device}, numbers

    @torch.no_grad()
    def _update_ema(self) -> None:
        trained = dict(self.networks.objective.named_parameters())
        for name, average in self.ema.named_parameters():
            average.mul_(0.99).add_(trained[name].float(), alpha=0.01)
