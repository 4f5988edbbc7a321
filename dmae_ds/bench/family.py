"""What `bench step` measures of a family: its first 2, 3, ... students together, and each of them alone.

The teacher's part of a step stays what it is for one student; the ratio of a family's step to those of its
students' separate runs is what the shared pass of the teacher saves.
"""

from __future__ import annotations

import statistics

from dmae_ds.config.family import members_of
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError

JOIN = " + "


def family_recipes(config: RunConfig) -> dict[str, RunConfig]:
    """Recipes by name: the whole family first, then its first students down to two, then each student alone.

    A name has the students' names: "small + base". Raises UserError for a family of one.
    """
    names = list(config.students)
    if len(names) == 1:
        raise UserError(f"this family has one student, {names[0]}, which is compared with nothing; add one")
    alone = members_of(config)
    families = {}
    for number in range(len(names), 1, -1):
        students = {name: config.students[name] for name in names[:number]}
        needs_teacher = any(alone[name].objective.needs_teacher for name in students)
        changes = {"students": students, "teacher": config.teacher if needs_teacher else None}
        families[JOIN.join(students)] = config.model_copy(update=changes)
    return families | alone


def compare_families(steps: list[dict]) -> list[dict]:
    """Compare families with the separate runs of their students; steps: figures of `family_recipes`.

    Returns for each {"students", "of_separate": ratio of seconds, median of the rounds, "teacher_seconds",
    "separate_teacher_seconds": of all separate runs, "of_separate_work": ratio of FLOP}.
    """
    by_name = {step["name"]: step for step in steps}
    compared = []
    for step in steps:
        names = step["name"].split(JOIN)
        if len(names) == 1:
            continue
        alone = [by_name[name] for name in names]
        rounds = zip(step["round_seconds"], *(one["round_seconds"] for one in alone), strict=True)
        compared.append(
            {
                "students": names,
                "of_separate": statistics.median(together / sum(each) for together, *each in rounds),
                "of_separate_work": step["gflop"] / sum(one["gflop"] for one in alone),
                "teacher_seconds": _teacher_seconds(step),
                "separate_teacher_seconds": [_teacher_seconds(one) for one in alone],
            }
        )
    return compared


def describe_families(compared: list[dict]) -> list[str]:
    """A line for each comparison."""
    return [
        f"{JOIN.join(one['students'])}: {one['of_separate']:.3f} of the time of {len(one['students'])} "
        f"separate runs, {one['of_separate_work']:.3f} of their work; the teacher takes "
        f"{one['teacher_seconds']:.3f} s instead of "
        f"{JOIN.join(f'{seconds:.3f}' for seconds in one['separate_teacher_seconds'])} s"
        for one in compared
    ]


def _teacher_seconds(step: dict) -> float:
    return step["parts"].get("teacher", {"seconds": 0.0})["seconds"]
