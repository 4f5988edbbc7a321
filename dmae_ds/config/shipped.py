"""Finds the recipes and DeepSpeed files that come with the project, in a checkout or in an installed wheel.

setup.cfg installs `launch/recipes` as `dmae_ds/shipped_recipes` and `ds_configs` as
`dmae_ds/shipped_ds_configs`, so nothing called `launch` or `ds_configs` becomes importable.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from dmae_ds.config.objectives import ObjectiveSection, ShippedObjective
from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table

_PACKAGE = Path(__file__).resolve().parents[1]
_RECIPES = (_PACKAGE.parent / "launch" / "recipes", _PACKAGE / "shipped_recipes", ".yaml")
# {kind: (folder in a checkout, folder in an installed package, suffix)}
_FOLDERS = {
    "recipe": _RECIPES,  # for `dmae-ds train`
    "evaluation recipe": _RECIPES,  # for `dmae-ds eval`: in the same folder, with the prefixes below
    "DeepSpeed file": (_PACKAGE.parent / "ds_configs", _PACKAGE / "shipped_ds_configs", ".json"),
}
_EVALUATION_PREFIXES = ("finetune_", "linear_", "supervised_")


def shipped_files(kind: str) -> dict[str, Path]:
    """Paths of all shipped files of a kind (a key of _FOLDERS), by their names without suffix."""
    checkout, installed, suffix = _FOLDERS[kind]
    folder = installed if installed.is_dir() else checkout
    files = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    return {
        name: path
        for name, path in files.items()
        if name.startswith(_EVALUATION_PREFIXES) == (kind == "evaluation recipe")
    }


def find_file(kind: str, name: str) -> Path:
    """Find the file that a user named: a path that exists, or the name of a shipped one.

    Raises UserError with the shipped names where it is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    files = shipped_files(kind)
    if name in files:
        return files[name]
    near = get_close_matches(name, files, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(
        f"{kind} '{name}' not found, neither as a file nor as a shipped name; {hint}shipped: "
        f"{', '.join(files)}"
    )


def shipped_objectives() -> dict[str, type[ObjectiveSection]]:
    """Schemas of the shipped objectives by name, in the order of `ShippedObjective`."""
    union, _ = get_args(ShippedObjective)
    return {
        name: schema
        for schema in get_args(union)
        for name in get_args(schema.model_fields["name"].annotation)
    }


def objective_table() -> str:
    """Table of the objectives with the first line of their docstrings, and how to start one."""
    rows = [("objective", "frozen teacher", "labels", "")]
    for name, schema in shipped_objectives().items():
        # Where it is a property, it depends on the other options of the section.
        teacher = {True: "yes", False: "no"}.get(schema.needs_teacher, "if asked for")
        rows.append((name, teacher, "yes" if schema.needs_labels else "no", schema.__doc__.splitlines()[0]))
    return "\n".join(
        [
            *text_table(rows, left=range(4)),
            "",
            f"recipes: {', '.join(shipped_files('recipe'))}",
            "train one: dmae-ds train RECIPE [key=value ...]",
        ]
    )
