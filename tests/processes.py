"""Waiting for processes of the tests that are no children of theirs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest


def wait_until_ended(pid: int, *, limit_s: float = 60) -> None:
    """Wait until a process is gone or a zombie; a signal takes effect some time after it was sent."""
    deadline = time.monotonic() + limit_s
    while _is_alive(pid):
        if time.monotonic() > deadline:
            pytest.fail(f"process {pid} is alive after {limit_s:g} s")
        time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
