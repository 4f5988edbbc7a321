"""Sliding windows over images of any size: predictions of all windows, averaged where they overlap.

The places are those of ADE20K's common evaluation: windows of 512 px every 341 px, the last one moved back
to the image's edge.
"""

from __future__ import annotations

from typing import Callable, Iterable

from torch import Tensor

Place = tuple[slice, slice]  # rows and columns of a window


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Places where windows start on a side of `length` px, rising; [0] where one window covers it.

    Every pixel is covered; the last window ends at the edge, so it may overlap more than the others.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} is not within 1 to {window}, the window")
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def window_places(height: int, width: int, *, window: int, stride: int) -> list[Place]:
    """Rows and columns of the square windows of an image, row by row; smaller where the image is."""
    return [
        (slice(top, min(top + window, height)), slice(left, min(left + window, width)))
        for top in window_starts(height, window, stride)
        for left in window_starts(width, window, stride)
    ]


def join_windows(scores: Iterable[Tensor], places: list[Place], *, height: int, width: int) -> Tensor:
    """Average the scores [N, K, h, w] of all windows of images: [N, K, height, width]."""
    total = count = None
    for window, place in zip(scores, places, strict=True):
        if total is None:
            total = window.new_zeros(*window.shape[:2], height, width)
            count = window.new_zeros(height, width)
        covered = total[(..., *place)]
        assert covered.shape == window.shape, f"scores {window.shape} of a window {covered.shape}"
        covered += window
        count[place] += 1
    return total / count


def slide(images: Tensor, predict: Callable[[Tensor], Tensor], *, window: int, stride: int) -> Tensor:
    """Average the predictions of square windows over images [N, C, H, W]: [N, K, H, W].

    predict: pixels [N, C, h, w] of a window to scores [N, K, h, w]; h and w are `window`, or the image's side
    where that is smaller
    """
    height, width = images.shape[2:]
    places = window_places(height, width, window=window, stride=stride)
    scores = (predict(images[(..., *place)]) for place in places)
    return join_windows(scores, places, height=height, width=width)
