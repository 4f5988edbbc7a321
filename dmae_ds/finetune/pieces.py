"""The micro-batches of each step, as the task of a classifier takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from accelerate import Accelerator
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.finetune.augment import Prepare
from dmae_ds.finetune.crd import CrdTask

Inputs = tuple[Tensor, ...]  # images, labels, and what a task with a memory is given next to them


class Pieces:
    """Prepares the loader's micro-batches for a task, and seeds its draws for each.

    batches: `accumulation` micro-batches of this rank per step
    """

    def __init__(
        self,
        task: nn.Module,
        batches: Iterator[Batch],
        prepare: Prepare,
        *,
        accumulation: int,
        accelerator: Accelerator,
    ):
        self.memory = task if isinstance(task, CrdTask) else None
        self.batches, self.prepare = batches, prepare
        self.accumulation, self.accelerator = accumulation, accelerator

    def __call__(self, step: int, first: int) -> Iterator[Inputs]:
        """The inputs of a step; first: place of this rank's first micro-batch in the global batch."""
        pieces = self._prepared(step, first)
        if self.memory is not None and step == 0:
            pieces = list(pieces)  # the whole step's images, which are seen twice
            self.memory.normalize(self._seeded(step, first, pieces), accelerator=self.accelerator)
        return self._seeded(step, first, pieces)

    def after_step(self) -> None:
        """Let a task with a memory remember the step's images."""
        if self.memory is not None:
            self.memory.remember(accelerator=self.accelerator)

    def _prepared(self, step: int, first: int) -> Iterator[Inputs]:
        for piece in range(first, first + self.accumulation):
            batch = next(self.batches)
            more = () if self.memory is None else self.memory.draw(batch)
            yield *self.prepare(batch.to(self.accelerator.device), step=step, piece=piece), *more

    def _seeded(self, step: int, first: int, pieces: Iterable[Inputs]) -> Iterator[Inputs]:
        for piece, inputs in enumerate(pieces, start=first):
            self.prepare.seed_drop_path(step=step, piece=piece)
            yield inputs
