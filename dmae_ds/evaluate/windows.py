"""Sliding windows over images of any size: predictions of all windows, averaged where they overlap.

The places are those of ADE20K's common evaluation: windows of 512 px every 341 px, the last one moved back
to the image's edge.
"""

from __future__ import annotations

from typing import Callable

from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Places where windows start on a side of `length` px, rising; [0] where one window covers it.

    Every pixel is covered; the last window ends at the edge, so it may overlap more than the others.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} is not within 1 to {window}, the window")
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def slide(images: Tensor, predict: Callable[[Tensor], Tensor], *, window: int, stride: int) -> Tensor:
    """Average the predictions of square windows over images [N, C, H, W]: [N, K, H, W].

    predict: pixels [N, C, h, w] of a window to scores [N, K, h, w]; h and w are `window`, or the image's side
    where that is smaller
    """
    height, width = images.shape[2:]
    total = count = None
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            place = (..., slice(top, min(top + window, height)), slice(left, min(left + window, width)))
            scores = predict(images[place])
            assert scores.shape[2:] == images[place].shape[2:], (
                "a prediction has another size than its window"
            )
            if total is None:
                total = scores.new_zeros(len(images), scores.shape[1], height, width)
                count = scores.new_zeros(height, width)
            total[place] += scores
            count[place] += 1
    return total / count
