"""What an objective may ask for, as plain values.

`train/` and `data/` wire exactly what is declared (base.py) and never ask for an objective's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal

from dmae_ds.data.views import View

__all__ = ["EmaSpec", "Progress", "View"]


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    step: the one that is about to be taken, from 0, of num_steps; epoch: fractional, of epochs
    accumulation: micro-batches of a rank in a step
    """

    step: int
    num_steps: int
    epoch: float
    epochs: float
    accumulation: int = 1


@dataclass(frozen=True)
class EmaSpec:
    """An exponential moving average of submodules of the objective, outside the engine (train/ema.py).

    parts: attribute names of these submodules: ("student",), ("student", "head")
    momentum: returns m of the update after the step of that progress: ema = m * ema + (1 - m) * student
    every: update after each optimiser step, or after the last step of each epoch; `never`: the copy stays
        what the submodules were when the run began, and a resumed run reads it from the checkpoint
    """

    parts: tuple[str, ...]
    momentum: Callable[[Progress], float] = lambda progress: 1.0
    every: Literal["step", "epoch", "never"] = "step"
