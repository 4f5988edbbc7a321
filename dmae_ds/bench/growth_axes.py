"""What `bench growth` changes of a recipe: student width, teacher depth, mask ratio, number of students.

Every recipe is built on the meta device before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dmae_ds.bench.random_teacher import check_one_teacher, check_replicated
from dmae_ds.config.family import check_one_student
from dmae_ds.config.load import flatten
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.objectives.build import build_objective
from dmae_ds.teacher.frozen import needed_depths
from dmae_ds.train.cut import CutRecipe

OWN = "recipe"  # name of the step of the recipe as it is
DEPTHS = "--depths"
MASK_RATIOS = (0.5, 0.75, 0.9)
NUM_STUDENTS = (1, 2, 3)

Number = int | float
ReadRecipe = Callable[[list[str]], RunConfig]  # the recipe with further overrides


@dataclass
class Axis:
    """One number of a recipe, and the recipes with other values of it.

    option: of the command, which gives values; own: the recipe's value, None where it has no such number
    choice: values where none are given; changes: {value -> overrides}
    recipes: by value, in ascending order, the recipe's own among them; blocks: of the teacher that run
    """

    option: str
    label: str
    own: Number | None
    choice: Sequence[Number]
    changes: Callable[[Number], list[str]]
    recipes: dict[Number, RunConfig] = field(default_factory=dict)
    blocks: dict[Number, int] = field(default_factory=dict)

    def name(self, value: Number) -> str:
        """Name of the step with a value."""
        return OWN if value == self.own else f"{self.label} {value:g}"


def find_axes(
    read: ReadRecipe, asked: dict[str, Sequence[Number] | None]
) -> tuple[list[Axis], dict[str, str]]:
    """Return the axes to measure, and what is left out: {an axis or one of its values: why}.

    asked: {option: values or None}; where none has values, every axis has those of our choice
    Raises UserError for values that the recipe refuses, and for recipes that can't be measured.
    """
    config = read([])
    check_one_student(config, "bench growth")
    check_one_teacher(config, "growth")
    check_replicated(config, "growth")
    width, depth, _ = _sizes(config)
    chosen = not any(asked.values())
    axes, left_out = [], {}
    for axis in _all_axes(config, width, depth):
        values = axis.choice if chosen else asked[axis.option]
        if not values:
            continue
        refused = _fill(axis, config, read, values)
        if refused and not chosen:
            raise UserError(f"{axis.option}: {next(iter(refused.values()))}")
        left_out |= refused
        if axis.label not in refused:
            axes.append(axis)
    return axes, left_out


def _all_axes(config: RunConfig, width: int, depth: int) -> list[Axis]:
    key = config.objective.mask_key
    ratio = None if key is None else flatten(config.model_dump())[key]
    student = config.student.model_dump(mode="json", exclude_unset=True)

    def copies(number: int) -> list[str]:
        students = {f"copy{place}": student for place in range(1, number + 1)}
        return ["student=null", f"students={json.dumps(students)}"]

    def keyed(name: str | None) -> Callable[[Number], list[str]]:
        return lambda value: [f"{name}={value}"]

    widths, depths = ((number // 2, 2 * number) for number in (width, depth))
    return [
        Axis("--widths", "student width", width, widths, keyed("student.embed_dim")),
        Axis(DEPTHS, "teacher depth", depth or None, depths, keyed("teacher.depth")),
        Axis("--mask-ratios", "mask ratio", ratio, MASK_RATIOS, keyed(key)),
        Axis("--students", "students", 1, NUM_STUDENTS, copies),
    ]


def _fill(axis: Axis, own: RunConfig, read: ReadRecipe, values: Sequence[Number]) -> dict[str, str]:
    """Fill an axis; returns why values are left out, by their names, and by its label where none is left."""
    if axis.own is None:
        return {axis.label: f"the recipe has no {axis.label}"}
    refused, recipes = {}, {axis.own: own}
    for value in {*values} - {axis.own}:
        try:
            recipes[value] = read(axis.changes(value))
            axis.blocks[value] = _sizes(recipes[value])[2]
        except UserError as error:
            recipes.pop(value, None)
            refused[axis.name(value)] = f"{axis.name(value)}: {str(error).splitlines()[0]}"
    axis.recipes = dict(sorted(recipes.items()))
    axis.blocks[axis.own] = _sizes(own)[2]
    if len(recipes) == 1:
        return refused | {axis.label: f"there is no value besides the recipe's own, {axis.own:g}"}
    if axis.option == DEPTHS and len(set(axis.blocks.values())) == 1:
        return {axis.label: f"{axis.blocks[axis.own]} blocks of the teacher run, whatever teacher.depth is"}
    return refused


def _sizes(config: RunConfig) -> tuple[int, int, int]:
    """Return the student's width, the teacher's depth and how many of its blocks run (0 without a teacher).

    The networks are built without a byte of weights. Raises UserError where they, or the batch, do not fit.
    """
    CutRecipe.of(config, World())
    objective, shapes = build_objective(config, device="meta")
    depth = blocks = 0
    if config.teacher is not None:
        depth = shapes[""].depth
        blocks, _ = needed_depths(objective.taps, depth)
    return objective.student.embed_dim, depth, blocks
