"""Schedules of a number over a run."""

import math


def half_cosine(first: float, last: float, share: float) -> float:
    """Return a value between `first` (share 0 of the run) and `last` (share 1), on half a cosine."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))
