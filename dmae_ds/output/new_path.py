"""Refusal to write a file or folder where something is already."""

from __future__ import annotations

import os
from pathlib import Path


def refuse_existing(out: Path, *, name: str, reads: Path) -> str | None:
    """The message for a path that exists, and never to delete what the command reads; None for a new path.

    name: the user's name for it, such as --out; reads: the file or folder that is read
    """
    if not os.path.lexists(out):
        return None
    source, target = reads.expanduser().resolve(), out.resolve()
    if target == source:
        return f"{name} '{out}' is what is read; choose another {name}"
    if target in source.parents:
        return f"{name} '{out}' exists and holds '{reads}', which is read; choose another {name}"
    return f"{name} '{out}' exists already; choose another {name}, or delete it"
