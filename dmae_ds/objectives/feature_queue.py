"""A queue of past targets, with which both networks compare an image (as `features` with over=queue does)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.distributed import collectives
from dmae_ds.objectives.needs import Progress


class FeatureQueue(nn.Module):
    """The targets of the last `size` images, the same on every rank, and part of the checkpoint.

    In a step all losses see the queue as it was before; the step's targets replace the oldest. A target's
    place depends on the step and on its image's place in the global batch alone, so the queue does not depend
    on how the batch is cut into ranks and micro-batches. It begins with random unit vectors.
    """

    def __init__(self, size: int, dim: int, generator: torch.Generator):
        super().__init__()
        rows = functional.normalize(nn.init.normal_(torch.empty(size, dim), generator=generator), dim=1)
        # Not persistent: it is not exported, and `Objective.memory` puts it into checkpoints.
        self.register_buffer("rows", rows, persistent=False)
        self._progress, self._micro = Progress(0, 1, 0.0, 1.0), 0
        self._past: Tensor | None = None

    def start_step(self, progress: Progress) -> None:
        """Note the coming step."""
        self._progress, self._micro, self._past = progress, 0, None

    def past(self) -> Tensor:
        """The queue [size, D] as it was before this step."""
        if not self.training:
            return self.rows
        if self._past is None:
            self._past = self.rows
        return self._past

    @torch.no_grad()
    def push(self, targets: Tensor) -> None:
        """Put a micro-batch's targets [N, D] of all ranks into the queue. Collective; once a micro-batch."""
        if not self.training:
            return
        num, ranks, accumulation = len(targets), collectives.world_size(), self._progress.accumulation
        rows = collectives.gather_rows(targets.to(self.rows.dtype))  # [ranks * N, D]
        share = num * accumulation  # a rank's part of the global batch
        first = self._progress.step * share * ranks + self._micro * num
        places = torch.arange(num, device=rows.device) + first
        of_ranks = torch.arange(ranks, device=rows.device)[:, None] * share + places
        # A new tensor: the losses of this step still need the old one.
        self.rows = self.rows.index_copy(0, of_ranks.flatten() % len(self.rows), rows)
        self._micro += 1
