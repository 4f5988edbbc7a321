"""Progress of a run on stderr: a bar on a terminal, dated lines in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from dmae_ds.output.lines import is_quiet, say

# Longest time between two lines, where log.every_steps take longer.
LINE_EVERY_S = 60.0


class Progress:
    """Counts steps from `initial` to `total`.

    On a terminal tqdm draws it; elsewhere a bar would become one line of thousands of columns.
    """

    def __init__(self, *, total: int, initial: int):
        self.total, self.initial, self.step = total, initial, initial
        self._since = self._shown = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty() and not is_quiet():
            self._bar = tqdm(total=total, initial=initial, unit="step", mininterval=0.5, dynamic_ncols=True)

    def advance(self) -> None:
        """Count one more step."""
        self.step += 1
        if self._bar is not None:
            self._bar.update()

    def is_late(self) -> bool:
        """Whether the last line is so long ago that the next one should not wait for log.every_steps."""
        return time.monotonic() - self._shown > LINE_EVERY_S

    def show(self, numbers: dict[str, str]) -> None:
        """Show numbers next to the bar, or print them as a line of the step that was counted last."""
        now = self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
            return
        per_s = (self.step - self.initial) / max(1e-9, now - self._since)
        left = tqdm.format_interval((self.total - self.step) / per_s) if per_s > 0 else "?"
        text = ", ".join(f"{name} {value}" for name, value in numbers.items())
        say(f"step {self.step:,} of {self.total:,} ({self.step / self.total:.0%}), {left} left: {text}")

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
