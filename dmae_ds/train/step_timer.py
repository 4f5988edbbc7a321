"""Where a step's time goes, as the host sees it: waiting for data or the teacher, saving, and the rest."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterable, Iterator, TypeVar

T = TypeVar("T")


class StepTimer:
    """Seconds since the last `lap`, by name.

    It measures only the host's time, where the host stops anyway, and synchronizes nothing. On a CPU that
    is where the time went. A GPU computes asynchronously: there `data` is real waiting, while a long
    `teacher` or `rest` only shows where the host caught up with the GPU.
    """

    def __init__(self):
        self._waited: dict[str, float] = {}
        self._since = time.perf_counter()

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; count the time until each arrives under `name`, without what is counted in it."""
        iterator = iter(items)
        while True:
            start, within = time.perf_counter(), sum(self._waited.values())
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                spent = time.perf_counter() - start - (sum(self._waited.values()) - within)
                self._waited[name] = self._waited.get(name, 0.0) + spent
            yield item

    @contextmanager
    def booking(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`; nothing in it may be counted under another name."""
        start = time.perf_counter()
        yield
        self._waited[name] = self._waited.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """{"seconds/data": ..., "seconds/rest": ...} since the last call; they add up to the whole time."""
        now = time.perf_counter()
        rest = now - self._since - sum(self._waited.values())
        spent = {**self._waited, "rest": rest}
        self._since, self._waited = now, dict.fromkeys(self._waited, 0.0)
        return {f"seconds/{name}": seconds for name, seconds in spent.items()}
