"""What an objective may ask for, as plain values; `train/` and `data/` wire exactly what is declared (base.py), and never ask for a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Literal

from dmae_ds.data.views import View

__all__ = ["EmaSpec", "Progress", "View"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the step that is about to be taken, counted from 0, out of `num_steps`; `epoch` of `epochs`, fractional."""

    step: int
    num_steps: int
    epoch: float
    epochs: float


@dataclass(frozen=True)
class EmaSpec:
    """An exponential moving average of parts of the objective, outside the engine (train/ema.py).

    parts: attribute names of submodules of the objective: ("student",), ("student", "head")
    momentum: m of the update after the step of that progress; ema = m * ema + (1 - m) * student
    every: update after each optimiser step, or after the last of each epoch
    """

    parts: tuple[str, ...]
    momentum: Callable[[Progress], float]
    every: Literal["step", "epoch"] = "step"
