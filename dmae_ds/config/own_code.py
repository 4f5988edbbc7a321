"""Imports of your own code: `my:Class` of objective.name, `my:function` of teacher.format and teacher.name.

A module is looked for like any other of Python's, then in the working folder and in the recipe's folder.
Those come last, so that no file there takes the place of an installed package.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path


def look_in(folder: Path) -> None:
    """Let modules of a folder be imported, after all others."""
    path = str(folder.resolve())
    if path not in sys.path:
        sys.path.append(path)


def import_own(name: str) -> object:
    """Import what `module:attribute` names.

    Raises ImportError with one line: the module was not found, it has no such attribute, or it can't run.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ImportError(f"{module_name} requires a module that is not here: {error}") from None
        raise ImportError(
            f"{error}; start the command in the folder where {module_name.split('.')[0]}.py is, keep it next "
            f"to the recipe, or install it"
        ) from None
    except Exception as error:  # whatever their module does
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = (
            getattr(error, "filename", None) or last.filename,
            getattr(error, "lineno", None) or last.lineno,
        )
        raise ImportError(f"{type(error).__name__}: {error}, in {place[0]}:{place[1]}") from None
    try:
        return getattr(module, attribute)
    except AttributeError:
        where = getattr(module, "__file__", None) or module_name
        raise ImportError(f"{where} has no {attribute!r}") from None
