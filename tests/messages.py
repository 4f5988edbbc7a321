"""Checks on messages: the words that a message must carry, never the whole sentence."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import Iterator

import pytest

from dmae_ds.errors import UserError

# Words that sources, messages and READMEs do not use, alone or as part of an identifier; the plain word is in
# the comment of each line.
_BANNED = re.compile(
    r"(?<![a-z])("
    r"mend(?:s|ed|ing)?"  # fix
    r"|anew"  # again
    r"|twins?"  # EMA teacher
    r"|ledgers?"  # results
    r"|of no use"  # requires
    r")(?![a-z])"
)


def banned_words(text: str) -> list[str]:
    """Words of `text` that this repository does not use, in their order."""
    return _BANNED.findall(text.lower())


@contextmanager
def refused(*words: object, error: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo]:
    """The block raises `error` with one line that carries every word: keys, values found, values offered."""
    with pytest.raises(error) as raised:
        yield raised
    text = str(raised.value)
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    missing = [str(word) for word in words if str(word) not in text]
    assert not missing, f"{missing} not in {text!r}"
