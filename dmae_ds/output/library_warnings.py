"""Warnings that libraries address to programmers: hidden, unless Python's own switches ask for them.

DeepSpeed calls functions that torch has deprecated, PIL warns of palettes: with several ranks each says so,
with a path into site-packages, and no user can do anything about it. `PYTHONWARNINGS=default` shows them.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

# Also of warnings that a library attributes to the line that called it.
_PACKAGES = ("site-packages", "dist-packages")
_OWN = tuple(str(Path(__file__).parents[2] / name) for name in ("dmae_ds", "data_prep"))


def hide_library_warnings() -> None:
    """Hide warnings whose place is an installed package, in this process and in the workers it forks."""
    if sys.warnoptions or "PYTHONWARNINGS" in os.environ:
        return
    show = warnings.showwarning
    if getattr(show, "hides_libraries", False):
        return

    def show_own(message, category, filename, lineno, file=None, line=None):
        if not is_of_library(filename):
            show(message, category, filename, lineno, file, line)

    show_own.hides_libraries = True
    warnings.showwarning = show_own


def is_of_library(filename: str) -> bool:
    """Whether a warning's place is an installed package or Python itself, not this program."""
    if filename.startswith(_OWN):
        return False
    path = Path(filename)
    return any(name in path.parts for name in _PACKAGES) or filename.startswith((sys.base_prefix, "<frozen"))
