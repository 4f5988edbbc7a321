"""The training loop: steps of accumulated micro-batches. All draws are keyed (augment.py).

`dmae_ds/dense` trains by it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmae_ds.errors import RunFailed
from dmae_ds.finetune.optim import set_lr
from dmae_ds.finetune.tasks import set_training

CHECK_EVERY = 50  # steps between checks that the loss is finite; a check waits for the device


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[tuple],
    *,
    lr: float,
    accumulation: int,
    clip_grad: float,
    accelerator: Accelerator,
) -> tuple[dict[str, Tensor], Tensor]:
    """Take one optimiser step over `accumulation` micro-batches; gradients are averaged.

    pieces: the model's arguments for each micro-batch; it returns {"loss": scalar, named parts}
    clip_grad: largest global gradient norm, 0: no clipping
    Returns the means of all scalars that the model returned, and the gradient's global norm before clipping,
    on the device.
    """
    set_lr(optimizer, lr)
    totals: dict[str, Tensor] = {}
    for number, arguments in enumerate(pieces):
        last = number + 1 == accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                outputs = model(*arguments)
            accelerator.backward(outputs["loss"] / accumulation)
        for name, value in outputs.items():
            if value.ndim == 0:
                totals[name] = totals.get(name, 0.0) + value.detach().float() / accumulation
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return totals, norm


@dataclass
class Losses:
    """Sums of losses and gradient norms since the last validation.

    totals: by name, the same names in every step and on every rank, "loss" and "grad_norm" among them
    """

    accelerator: Accelerator
    totals: dict[str, Tensor | float] = field(default_factory=lambda: {"loss": 0.0, "grad_norm": 0.0})
    steps: int = 0

    def add(self, losses: dict[str, Tensor], norm: Tensor) -> None:
        """Add the losses and the gradient norm of one step."""
        for name, value in {**losses, "grad_norm": norm}.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.steps += 1

    def mean(self, step: int) -> dict[str, float]:
        """{"loss", "grad_norm", named parts} over steps and ranks, the same on every rank. Collective.

        Raises RunFailed, on every rank, for a loss that is not finite.
        """
        sums = torch.stack([torch.as_tensor(total) for total in self.totals.values()])
        means = sums.float().to(self.accelerator.device) / max(1, self.steps)
        reduced = self.accelerator.reduce(means, reduction="mean").tolist()
        by_name = dict(zip(self.totals, reduced, strict=True))
        if not math.isfinite(by_name["loss"]):
            raise _failure(f"the loss of one of the {self.steps} steps up to {step} is not finite")
        return by_name


def raise_unless_finite(tensors: Iterable[Tensor], step: int, *, accelerator: Accelerator) -> None:
    """Raise RunFailed, on every process, where a step has left weights that are not finite. Collective."""
    broken = sum(not bool(tensor.isfinite().all()) for tensor in tensors)
    if accelerator.reduce(torch.tensor(broken, device=accelerator.device), reduction="sum").item():
        raise _failure(f"weights are not finite after step {step}")


def _failure(what: str) -> RunFailed:
    error = RunFailed(
        f"{what}; the files of the epoch before are unchanged: after precision=bf16, continue with "
        "precision=fp32 and --resume auto; else start again with a lower optim.base_lr or optim.lr "
        "and another run.dir"
    )
    error.on_every_rank = True
    return error


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Numbers of the loop. lr_at: finished steps -> the rate of the next step.

    epoch_ends: numbers of finished steps after which an epoch is over; clip_grad: largest global gradient
    norm, 0: none; parts: whether the named parts of the loss are averaged, too
    """

    start_step: int
    num_steps: int
    epoch_ends: set[int]
    accumulation: int
    clip_grad: float
    lr_at: Callable[[int], float]
    parts: bool = False


def train(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Callable[[int, int], Iterable[tuple]],
    settings: LoopSettings,
    *,
    accelerator: Accelerator,
    after_step: Callable[[], None],
    after_epoch: Callable[[int, dict[str, float]], None],
) -> None:
    """Train from start_step to num_steps.

    pieces: (finished steps, place in the global batch of this rank's first micro-batch) -> the arguments of
    the task's forward for `accumulation` micro-batches
    after_epoch: gets the finished steps and the mean losses of the epoch; it may leave the task in eval mode
    Raises RunFailed for a loss that is not finite.
    """
    model = accelerator.prepare_model(task)
    losses = Losses(accelerator)
    set_training(task)
    for step in range(settings.start_step, settings.num_steps):
        means, norm = take_step(
            model,
            optimizer,
            pieces(step, accelerator.process_index * settings.accumulation),
            lr=settings.lr_at(step),
            accumulation=settings.accumulation,
            clip_grad=settings.clip_grad,
            accelerator=accelerator,
        )
        losses.add(means if settings.parts else {"loss": means["loss"]}, norm)
        after_step()
        if step + 1 in settings.epoch_ends:
            after_epoch(step + 1, losses.mean(step + 1))
            losses = Losses(accelerator)
            set_training(task)
        elif (step + 1) % CHECK_EVERY == 0:
            losses.mean(step + 1)
