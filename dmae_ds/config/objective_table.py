"""The table that `dmae-ds train` prints where it is given no recipe: what can be optimised, and what each needs. Made of the schemas."""

from __future__ import annotations

from typing import get_args

from dmae_ds.config.objectives import ObjectiveSection, ShippedObjective
from dmae_ds.config.shipped import shipped_files


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
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"recipes: {', '.join(shipped_files('recipe'))}",
            "train one: dmae-ds train RECIPE [key=value ...]",
        ]
    )
