"""Progress of a command on stderr: a bar on a terminal, dated lines in a log file."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from dmae_ds.output.lines import is_quiet, log, say

# Longest time between two lines, where log.every_steps take longer, or there is nothing to report.
LINE_EVERY_S = 60.0


class Progress:
    """Counts from `initial` to `total`.

    On a terminal tqdm draws it; elsewhere a bar would become one line of thousands of columns, and `show`
    prints a line instead, as `advance` does every `every_s` seconds.
    """

    def __init__(
        self,
        *,
        total: int,
        initial: int = 0,
        unit: str = "step",
        title: str | None = None,
        every_s: float = math.inf,
        is_shown: bool = True,
    ):
        self.total, self.initial, self.step = total, initial, initial
        self.unit, self.title, self.every_s, self.is_shown = unit, title, every_s, is_shown
        self._since = self._shown = time.monotonic()
        self._bar: tqdm | None = None
        if is_shown and sys.stderr.isatty() and not is_quiet():
            self._bar = tqdm(
                total=total, initial=initial, unit=unit, desc=title, mininterval=0.5, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1) -> None:
        """Count one more step, or several."""
        self.step += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown >= self.every_s:
            self.show({})

    def is_late(self) -> bool:
        """Whether the last line is so long ago that the next one should not wait for log.every_steps."""
        return time.monotonic() - self._shown > LINE_EVERY_S

    def show(self, numbers: dict[str, str]) -> None:
        """Show numbers next to the bar, or print them as a line of the step that was counted last."""
        now = self._shown = time.monotonic()
        if not self.is_shown:
            return
        per_s = (self.step - self.initial) / max(1e-9, now - self._since)
        left = tqdm.format_interval((self.total - self.step) / per_s) if per_s > 0 else "?"
        text = ", ".join(f"{name} {value}" for name, value in numbers.items())
        share = f"{self.step / self.total:.0%}"
        place = f"{self.unit} {self.step:,} of {self.total:,} ({share}), {left} left"
        line = ": ".join(part for part in (self.title, place, text) if part)
        if self._bar is None:
            say(line)
        else:
            self._bar.set_postfix(numbers, refresh=False)
            log(line)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
