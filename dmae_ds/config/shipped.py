"""Finds the recipes and DeepSpeed files that come with the project, in a checkout or in an installed wheel.

setup.cfg installs `launch/recipes` as `dmae_ds/shipped_recipes` and `ds_configs` as
`dmae_ds/shipped_ds_configs`, so nothing called `launch` or `ds_configs` becomes importable.
"""

from __future__ import annotations

import re
import textwrap
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table

if TYPE_CHECKING:
    from dmae_ds.config.objectives import ObjectiveSection

_PACKAGE = Path(__file__).resolve().parents[1]
_RECIPES = (_PACKAGE.parent / "launch" / "recipes", _PACKAGE / "shipped_recipes", ".yaml")
# {kind: (folder in a checkout, folder in an installed package, suffix)}
_FOLDERS = {
    "recipe": _RECIPES,  # for `dmae-ds train`
    "evaluation recipe": _RECIPES,  # for `dmae-ds eval`: in the same folder, with the prefixes below
    "DeepSpeed file": (_PACKAGE.parent / "ds_configs", _PACKAGE / "shipped_ds_configs", ".json"),
}
# Beginning of an evaluation recipe's name -> the command that it is for; the first that fits counts.
_EVALUATIONS = {
    "finetune_": "eval finetune",
    "supervised_": "eval finetune",
    "linear_segment_": "eval segment",
    "linear_": "eval linear",
    "upernet_": "eval segment",
    "g2sd_segment_": "eval segment",
    "vitdet_": "eval detect",
    "maskrcnn_": "eval detect",
    "detect_": "eval detect",
    "g2sd_detect_": "eval detect",
}


def shipped_files(kind: str) -> dict[str, Path]:
    """Paths of all shipped files of a kind (a key of _FOLDERS), by their names without suffix."""
    checkout, installed, suffix = _FOLDERS[kind]
    folder = installed if installed.is_dir() else checkout
    files = {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}
    return {
        name: path
        for name, path in files.items()
        if (command_of(name) != "train") == (kind == "evaluation recipe")
    }


def command_of(name: str) -> str:
    """The command that a shipped recipe is for: train, eval finetune, eval segment and so on."""
    return next((command for start, command in _EVALUATIONS.items() if name.startswith(start)), "train")


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


def recipe_list() -> str:
    """Names of all shipped recipes, each with the first sentence of its file."""
    lines: list[str] = []
    files = {**shipped_files("recipe"), **shipped_files("evaluation recipe")}
    for command in dict.fromkeys(["train", *_EVALUATIONS.values()]):
        names = [name for name in files if command_of(name) == command]
        width = max(map(len, names))
        usage = f"{command} RUN --recipe" if command.startswith("eval") else command
        lines += [
            f"dmae-ds {usage} ...",
            *(f"  {name:<{width}}  {_first_sentence(files[name])}" for name in names),
            "",
        ]
    return "\n".join([*lines, "a recipe: dmae-ds recipes NAME; every key: dmae-ds recipes --all"])


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe of any kind, or of a file. Raises UserError where there is none."""
    kind = "evaluation recipe" if name in shipped_files("evaluation recipe") else "recipe"
    return find_file(kind, name).read_text(encoding="utf-8").rstrip("\n")


def _first_sentence(path: Path) -> str:
    """First sentence of the comment at the top of a recipe, on one line of at most 100 characters."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    sentence = re.split(r"(?<!Sec)(?<!Eq)\.\s", " ".join(comment))[0].rstrip(".")
    return textwrap.shorten(sentence, width=100, placeholder=" ...")


def shipped_objectives() -> dict[str, type[ObjectiveSection]]:
    """Schemas of the shipped objectives by name, in the order of `ShippedObjective`."""
    from dmae_ds.config.objectives import (
        ShippedObjective,
    )  # late: pydantic takes most of the time of `recipes`

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
            "what each of them is: dmae-ds recipes; every key: dmae-ds recipes --all",
            "train one: dmae-ds train RECIPE [key=value ...]",
        ]
    )
