"""A probe's question and answer as words, and a part of the answer that may fail alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

MARK = "dmae-ds-facts "
CONNECT_S = 5.0  # that a part waits for another node


def encode(request: dict) -> str:
    """A request as one word that every shell leaves alone."""
    return base64.urlsafe_b64encode(json.dumps(request).encode()).decode()


def decode(word: str) -> dict:
    """A request again."""
    return json.loads(base64.urlsafe_b64decode(word))


def decode_answer(output: str) -> dict | None:
    """The facts in a probe's output, whatever else a login shell or a library printed; None where there are none."""
    for line in reversed(output.splitlines()):
        _, mark, text = line.partition(MARK)
        if mark:
            try:
                return json.loads(text)
            except json.JSONDecodeError:
                continue
    return None


def guarded(part: Callable[[], dict]) -> dict:
    """A part's facts, or {"error": one line}."""
    try:
        return part()
    except Exception as error:  # whatever a strange machine does: it is a fact
        ours = type(error).__module__.startswith("dmae_ds")
        return {
            "error": str(error) if ours else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        }
