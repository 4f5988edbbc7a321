"""Requests to a node and its answers as text, and parts of an answer that may fail without the others."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

MARK = "dmae-ds-facts "
CONNECT_S = 5.0  # how long a node waits for another one


def encode(request: dict) -> str:
    """Encode a request as one word that no shell changes."""
    return base64.urlsafe_b64encode(json.dumps(request).encode()).decode()


def decode(word: str) -> dict:
    """Decode the word that `encode` made."""
    return json.loads(base64.urlsafe_b64decode(word))


def decode_answer(output: str) -> dict | None:
    """Find the facts in a node's output, among lines of a login shell or a library, or return None."""
    for line in reversed(output.splitlines()):
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                continue
    return None


def guarded(part: Callable[[], dict]) -> dict:
    """The facts of one part, or {"error": one line} if it raised."""
    try:
        return part()
    except Exception as error:  # anything may happen on an unknown machine, and it is a fact
        if type(error).__module__.startswith("dmae_ds"):
            return {"error": str(error)}
        first_line = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
