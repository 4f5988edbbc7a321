"""Lines on stderr about what a command is doing: above a progress bar, or dated in a log file.

A run also keeps them in a file of its own (`keep_log`), whatever its stderr is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_quiet = False
_log_fd: int | None = None


def be_quiet() -> None:
    """Leave out all lines and bars from now on: `--quiet`. Results, warnings and errors are no such lines."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    """Whether `be_quiet` was called."""
    return _quiet


def say(text: str, *, dated: bool = True, always: bool = False) -> None:
    """Print a line, in a log file behind the date and time unless `dated` is false, and log it.

    always: also with `--quiet`, for warnings
    """
    log(text, dated=dated)
    if _quiet and not always:
        return
    from tqdm import tqdm

    if dated and not sys.stderr.isatty():
        text = _dated(text)
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def log(text: str, *, dated: bool = True) -> None:
    """Append a line to the log that `keep_log` opened; nothing happens where there is none.

    It may be called in a handler of signals: no buffer of a stream is involved.
    """
    global _log_fd
    if _log_fd is None:
        return
    try:
        os.write(_log_fd, f"{_dated(text) if dated else text}\n".encode())
    except OSError as error:  # a full disk; whether the run can go on is for the next save to say
        _log_fd = None
        print(f"WARNING: the log cannot be written any more: {error}", file=sys.stderr, flush=True)


def keep_log(path: Path) -> None:
    """Append all lines from now on to a file too, also under `--quiet`, until `close_log`."""
    global _log_fd
    _log_fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def close_log() -> None:
    """Close the log, if there is one."""
    global _log_fd
    if _log_fd is not None:
        os.close(_log_fd)
    _log_fd = None


def _dated(text: str) -> str:
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
