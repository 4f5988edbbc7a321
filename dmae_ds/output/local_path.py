"""Refusal of URLs where a file or folder of this machine is meant.

Without it `run.dir=s3://bucket/run` would become a folder `s3:` in the working folder, and the run would be
gone with the machine.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterable

# Also as pathlib writes it, s3:/bucket; `C:/` has one letter.
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]+:/")


def looks_like_url(value: str | Path) -> bool:
    """Whether a location is a URL, also after pathlib has joined its slashes."""
    return _URL.match(str(value)) is not None


def refuse_url(name: str, value: str | Path, *, instead: str) -> str | None:
    """The message for a location that is a URL; None for a path.

    name: the user's name for it, such as run.dir; instead: what to do
    """
    return f"{name} '{_as_typed(value)}' is a URL; {instead}" if looks_like_url(value) else None


def refuse_urls(arguments: dict[str, Any], *, command: str, may_be_url: Iterable[str] = ()) -> str | None:
    """The message for the first argument of a command that is a URL; None where there is none.

    arguments: {name: value}, where a value may be a list; may_be_url: names of those that take one
    """
    for name, value in arguments.items():
        for item in value if isinstance(value, list) else [value]:
            if name not in may_be_url and isinstance(item, str | Path) and looks_like_url(item):
                return refuse_url(
                    name.replace("_", "-"),
                    item,
                    instead=f"{command} reads and writes it on this machine: give a path, and copy the file "
                    f"or folder between there and the URL",
                )
    return None


def _as_typed(value: str | Path) -> str:
    text = str(value)
    return text if not isinstance(value, Path) else re.sub(r":/(?!/)", "://", text, count=1)
