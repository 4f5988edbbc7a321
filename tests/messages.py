"""What tests ask of a message: the words that it must carry, never the sentence, so that prose can be improved freely."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import pytest

from dmae_ds.errors import UserError


@contextmanager
def refused(*words: object, error: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo]:
    """The block raises `error` with one line that carries every word: keys, values found, values offered."""
    with pytest.raises(error) as raised:
        yield raised
    text = str(raised.value)
    assert "\n" not in text.strip(), f"more than one line: {text!r}"
    missing = [str(word) for word in words if str(word) not in text]
    assert not missing, f"{missing} not in {text!r}"
