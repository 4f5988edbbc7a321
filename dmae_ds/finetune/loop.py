"""The loop: steps of accumulated micro-batches, and validation. Everything random was keyed before (augment.py)."""

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
from dmae_ds.finetune.optim import set_lr
from dmae_ds.finetune.tasks import set_training
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.augment import normalized

CHECK_EVERY = 50  # steps between two looks at the loss, which wait for the device


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pieces: Iterable[tuple[Tensor, Tensor]],
    *,
    lr: float,
    accumulation: int,
    clip_grad: float,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor]:
    """One optimiser step over `accumulation` micro-batches (images, labels), whose gradients are averaged.

    clip_grad: largest global gradient norm; 0: not clipped
    Returns the mean loss and the gradient's global norm before clipping, scalars on the device.
    """
    set_lr(optimizer, lr)
    total = 0.0
    for number, (images, labels) in enumerate(pieces):
        last = number + 1 == accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = model(images, labels)["loss"]
            accelerator.backward(loss / accumulation)
        total = total + loss.detach().float() / accumulation
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, clip_grad or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@dataclass
class Losses:
    """Sums since the last validation; `mean` is over steps and ranks."""

    accelerator: Accelerator
    total: Tensor | float = 0.0
    norm: Tensor | float = 0.0
    steps: int = 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.total, self.norm, self.steps = self.total + loss, self.norm + norm, self.steps + 1

    def mean(self, step: int) -> dict[str, float]:
        """{"loss", "grad_norm"}, the same on every rank. Collective. Raises RunFailed, on every rank, unless the loss is finite."""
        sums = torch.stack([torch.as_tensor(self.total), torch.as_tensor(self.norm)]).float().to(
            self.accelerator.device
        ) / max(1, self.steps)
        loss, norm = self.accelerator.reduce(sums, reduction="mean").tolist()
        if not math.isfinite(loss):
            error = RunFailed(
                f"the loss of one of the {self.steps} steps up to {step} is not finite; the last checkpoint is untouched: lower optim.base_lr, or set precision=fp32"
            )
            error.on_every_rank = True
            raise error
        return {"loss": loss, "grad_norm": norm}


def train(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    prepare: Prepare,
    accelerator: Accelerator,
    lr_at: Callable[[int], float],
    start_step: int,
    num_steps: int,
    accumulation: int,
    clip_grad: float,
    epoch_ends: set[int],
    after_step: Callable[[], None],
    after_epoch: Callable[[int, dict[str, float]], None],
) -> None:
    """Run from start_step to num_steps; `batches` yields `accumulation` micro-batches of this rank a step.

    lr_at: finished steps -> the rate of the next one; epoch_ends: numbers of finished steps after which an epoch is over
    after_epoch: is told the finished steps and the mean losses of the epoch; it may leave the task in eval mode
    Raises RunFailed when a loss is not finite.
    """
    model = accelerator.prepare_model(task)
    first_piece = accelerator.process_index * accumulation
    losses = Losses(accelerator)
    set_training(task)
    for step in range(start_step, num_steps):

        def pieces(step: int = step) -> Iterator[tuple[Tensor, Tensor]]:
            for number in range(accumulation):
                place = {"step": step, "piece": first_piece + number}
                prepared = prepare(next(batches).to(accelerator.device), **place)
                prepare.seed_drop_path(**place)
                yield prepared

        losses.add(
            *take_step(
                model,
                optimizer,
                pieces(),
                lr=lr_at(step),
                accumulation=accumulation,
                clip_grad=clip_grad,
                accelerator=accelerator,
            )
        )
        after_step()
        if step + 1 in epoch_ends:
            after_epoch(step + 1, losses.mean(step + 1))
            losses = Losses(accelerator)
            set_training(task)
        elif (step + 1) % CHECK_EVERY == 0:
            losses.mean(step + 1)


@torch.inference_mode()
def validate(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    normalize: Normalize,
    num_classes: int,
    accelerator: Accelerator,
) -> tuple[float, float | None]:
    """Top-1 and top-5 in percent over all ranks' batches, every picture once; top-5 is None with five classes or fewer. Collective."""
    network.eval()
    counts = torch.zeros(
        3, dtype=torch.float64, device=accelerator.device
    )  # right at once, right among five, pictures
    for batch in batches:
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            logits = network(normalized(batch.images, normalize))
        best = logits.float().topk(min(5, num_classes), dim=1).indices  # [N, 5]
        hits = best == batch.labels[:, None]
        counts += torch.stack(
            [hits[:, 0].sum(), hits.any(dim=1).sum(), torch.tensor(len(hits), device=hits.device)]
        )
    right, among_five, pictures = accelerator.reduce(counts, reduction="sum").tolist()
    return 100 * right / pictures, (100 * among_five / pictures if num_classes > 5 else None)
