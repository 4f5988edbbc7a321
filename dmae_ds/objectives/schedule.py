"""How a number moves over a run."""

import math


def half_cosine(first: float, last: float, share: float) -> float:
    """From `first` to `last` along half a cosine; share: how much of the run is over, 0 to 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))
