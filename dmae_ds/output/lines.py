"""Lines on stderr about what a command is doing: above a progress bar, or dated in a log file."""

from __future__ import annotations

import sys
import time

_quiet = False


def be_quiet() -> None:
    """Leave out all lines and bars from now on: `--quiet`. Results, warnings and errors are no such lines."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    """Whether `be_quiet` was called."""
    return _quiet


def say(text: str, *, dated: bool = True, always: bool = False) -> None:
    """Print a line, in a log file behind the date and time unless `dated` is false.

    always: also with `--quiet`, for warnings
    """
    if _quiet and not always:
        return
    from tqdm import tqdm

    if dated and not sys.stderr.isatty():
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
