"""What a step's time went into, as the host sees it: waiting for data, for the teacher, a save since the step before, and the rest."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Iterable, Iterator, TypeVar

T = TypeVar("T")


class StepTimer:
    """Seconds since the last `lap`, by name.

    Only the host's time, read where the host stops anyway: nothing is synchronised for it. On a CPU that is where the
    time went. A GPU computes behind the host's back: there `data` is true waiting, a long `teacher` or `rest` only says
    where the host caught up with the GPU.
    """

    def __init__(self):
        self._waited: dict[str, float] = {}
        self._since = time.perf_counter()

    def waiting(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each arrives is booked under `name`, less what is booked under names within it."""
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
        """What is done within is booked under `name`; nothing in it may be."""
        start = time.perf_counter()
        yield
        self._waited[name] = self._waited.get(name, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """{"seconds/data": ..., "seconds/rest": ...} since the last call; together they are the time that passed."""
        now = time.perf_counter()
        rest = now - self._since - sum(self._waited.values())
        found = {**self._waited, "rest": rest}
        self._since, self._waited = now, dict.fromkeys(self._waited, 0.0)
        return {f"seconds/{name}": seconds for name, seconds in found.items()}
