"""Rooms that are functions, too: `dmae_ds.train(...)` trains, and `dmae_ds.train.loop` is a module as before.

The public functions have the names of their rooms, and importing a module below a room sets the package's
attribute of that name to the room. So the room itself is made callable (a module's `__class__` may be set).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(function: Callable) -> None:
    """Let a call of the module that defines the function be a call of the function, and help() say so."""

    class Room(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module = sys.modules[function.__module__]
    module.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nThe room of this name: {module.__doc__}"
    module.__signature__ = inspect.signature(function)
    module.__class__ = Room
