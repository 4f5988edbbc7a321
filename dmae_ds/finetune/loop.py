"""The training loop: steps of accumulated micro-batches. All draws are keyed (augment.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.errors import RunFailed
from dmae_ds.finetune.augment import Prepare
from dmae_ds.finetune.crd import CrdTask
from dmae_ds.finetune.optim import set_lr
from dmae_ds.finetune.tasks import set_training

CHECK_EVERY = 50  # steps between checks that the loss is finite; a check waits for the device


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[tuple[Tensor, ...]],
    *,
    lr: float,
    accumulation: int,
    clip_grad: float,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step over `accumulation` micro-batches; gradients are averaged.

    pieces: the model's inputs for each: images, labels, and what a task with a memory is given next to them
    clip_grad: largest global gradient norm, 0: no clipping
    Returns the mean loss and the gradient's global norm before clipping, scalars on the device.
    """
    set_lr(optimizer, lr)
    total = 0.0
    for number, inputs in enumerate(pieces):
        last = number + 1 == accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = model(*inputs)["loss"]
            accelerator.backward(loss / accumulation)
        total = total + loss.detach().float() / accumulation
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@dataclass
class Losses:
    """Sums of losses and gradient norms since the last validation."""

    accelerator: Accelerator
    total: Tensor | float = 0.0
    norm: Tensor | float = 0.0
    steps: int = 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Add the loss and the gradient norm of one step."""
        self.total, self.norm, self.steps = self.total + loss, self.norm + norm, self.steps + 1

    def mean(self, step: int) -> dict[str, float]:
        """{"loss", "grad_norm"} over steps and ranks, the same on every rank. Collective.

        Raises RunFailed, on every rank, for a loss that is not finite.
        """
        sums = torch.stack([torch.as_tensor(self.total), torch.as_tensor(self.norm)])
        means = sums.float().to(self.accelerator.device) / max(1, self.steps)
        loss, norm = self.accelerator.reduce(means, reduction="mean").tolist()
        if not math.isfinite(loss):
            raise _failure(f"the loss of one of the {self.steps} steps up to {step} is not finite")
        return {"loss": loss, "grad_norm": norm}


def raise_unless_finite(tensors: Iterable[Tensor], step: int, *, accelerator: Accelerator) -> None:
    """Raise RunFailed, on every process, where a step has left weights that are not finite. Collective."""
    broken = sum(not bool(tensor.isfinite().all()) for tensor in tensors)
    if accelerator.reduce(torch.tensor(broken, device=accelerator.device), reduction="sum").item():
        raise _failure(f"weights are not finite after step {step}")


def _failure(what: str) -> RunFailed:
    error = RunFailed(
        f"{what}; the files of the epoch before are unchanged: after precision=bf16, continue with "
        "precision=fp32 and --resume auto; else start again with a lower optim.base_lr and another run.dir"
    )
    error.on_every_rank = True
    return error


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Numbers of the loop. lr_at: finished steps -> the rate of the next step.

    epoch_ends: numbers of finished steps after which an epoch is over; clip_grad: largest global gradient
    norm, 0: none
    """

    start_step: int
    num_steps: int
    epoch_ends: set[int]
    accumulation: int
    clip_grad: float
    lr_at: Callable[[int], float]


def train(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    settings: LoopSettings,
    *,
    prepare: Prepare,
    accelerator: Accelerator,
    after_step: Callable[[], None],
    after_epoch: Callable[[int, dict[str, float]], None],
) -> None:
    """Train from start_step to num_steps.

    batches: `accumulation` micro-batches of this rank per step
    after_epoch: gets the finished steps and the mean losses of the epoch; it may leave the task in eval mode
    Raises RunFailed for a loss that is not finite.
    """
    model = accelerator.prepare_model(task)
    accumulation = settings.accumulation
    first_piece = accelerator.process_index * accumulation

    memory = task if isinstance(task, CrdTask) else None

    def prepared(step: int) -> Iterator[tuple[Tensor, ...]]:
        for number in range(accumulation):
            batch = next(batches)
            more = () if memory is None else memory.draw(batch)
            yield *prepare(batch.to(accelerator.device), step=step, piece=first_piece + number), *more

    def seeded(step: int, pieces: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
        for number, inputs in enumerate(pieces):
            prepare.seed_drop_path(step=step, piece=first_piece + number)
            yield inputs

    losses = Losses(accelerator)
    set_training(task)
    for step in range(settings.start_step, settings.num_steps):
        pieces = prepared(step)
        if memory is not None and step == 0:
            pieces = list(pieces)  # the whole step's images, which are seen twice
            memory.normalize(seeded(step, pieces), accelerator=accelerator)
        loss, norm = take_step(
            model,
            optimizer,
            seeded(step, pieces),
            lr=settings.lr_at(step),
            accumulation=accumulation,
            clip_grad=settings.clip_grad,
            accelerator=accelerator,
        )
        if memory is not None:
            memory.remember(accelerator=accelerator)
        losses.add(loss, norm)
        after_step()
        if step + 1 in settings.epoch_ends:
            after_epoch(step + 1, losses.mean(step + 1))
            losses = Losses(accelerator)
            set_training(task)
        elif (step + 1) % CHECK_EVERY == 0:
            losses.mean(step + 1)
