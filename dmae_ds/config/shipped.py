"""Where the recipes and DeepSpeed files that come with the project are: beside a checkout, or inside an installed wheel.

setup.cfg installs `launch/recipes` as `dmae_ds/shipped_recipes` and `ds_configs` as `dmae_ds/shipped_ds_configs`, so
nothing called `launch` or `ds_configs` becomes importable.
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
# kind -> (folder in a checkout, folder in an installed package, suffix)
_FOLDERS = {
    "recipe": _RECIPES,  # of `dmae-ds train`
    "evaluation recipe": _RECIPES,  # of `dmae-ds eval`: in the same folder, told apart by their names
    "DeepSpeed file": (_PACKAGE.parent / "ds_configs", _PACKAGE / "shipped_ds_configs", ".json"),
}
_OF_EVALUATIONS = ("finetune_", "linear_", "supervised_")


def shipped_files(kind: str) -> dict[str, Path]:
    """Every shipped file of a kind (of _FOLDERS): name without suffix -> path."""
    checkout, installed, suffix = _FOLDERS[kind]
    folder = installed if installed.is_dir() else checkout
    files = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    return {
        name: path
        for name, path in files.items()
        if name.startswith(_OF_EVALUATIONS) == (kind == "evaluation recipe")
    }


def find_file(kind: str, name: str) -> Path:
    """The file a user named: a path that exists, or the name of a shipped one.

    Raises UserError that lists the shipped names when it is neither.
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
        f"{kind} '{name}' is neither a file nor a shipped name; {hint}shipped: {', '.join(files)}"
    )


def shipped_objectives() -> dict[str, type[ObjectiveSection]]:
    """The schemas by their names, in the schema's order."""
    union, _ = get_args(ShippedObjective)
    return {
        name: schema
        for schema in get_args(union)
        for name in get_args(schema.model_fields["name"].annotation)
    }


def objective_table() -> str:
    """A row each: name, teacher, labels, and the schema's own first line; then how to start."""
    rows = [("objective", "frozen teacher", "labels", "")]
    for name, schema in shipped_objectives().items():
        # A property depends on the rest of the section.
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
