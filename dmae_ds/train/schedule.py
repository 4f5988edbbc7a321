"""Steps of a run: how many there are, and the learning rate and progress of each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmae_ds.config.run import OptimConfig
from dmae_ds.objectives.needs import Progress
from dmae_ds.train.learning_rate import learning_rate


@dataclass(frozen=True)
class Schedule:
    """Steps of a run and what depends on them.

    num_steps: optimizer steps of the whole run; num_samples: images of an epoch
    accumulation: micro-batches of a rank in a step; log_every: steps between two flushes of the metrics
    """

    optim: OptimConfig
    num_steps: int
    num_samples: int
    accumulation: int
    log_every: int

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        return self.optim.global_batch

    @property
    def steps_per_epoch(self) -> float:
        """Steps of an epoch, which need not be a whole number."""
        return self.num_samples / self.global_batch

    def epoch_at(self, step: int) -> float:
        """Epochs after `step` finished steps; whole epochs are whole numbers, because it multiplies first."""
        return step * self.global_batch / self.num_samples

    def lr_at(self, step: int) -> float:
        """Learning rate of the step that follows `step` finished ones."""
        return learning_rate(self.optim, step / self.steps_per_epoch)

    def is_due(self, step: int, *, every: float) -> bool:
        """Whether `step` is the first at or after a multiple of `every` epochs, or the last of the run."""

        def multiples(steps: int) -> int:
            return math.floor(steps / (every * self.steps_per_epoch) + 1e-9)  # 3 * (1 / 3) epochs are one

        return step == self.num_steps or multiples(step) > multiples(step - 1)

    def progress_at(self, step: int) -> Progress:
        """Progress of the run after `step` finished steps."""
        return Progress(
            step, self.num_steps, self.epoch_at(step), self.optim.epochs, accumulation=self.accumulation
        )
