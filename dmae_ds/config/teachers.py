"""Several teachers in one recipe: their names, the names of their taps, and whether each is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmae_ds.config.networks import NamedTeacherConfig, TeacherConfig

NAME = r"[a-z][a-z0-9_]*"


def check_names(names: Iterable[str], *, section: str, example: str) -> None:
    """Raise ValueError for a section of named networks that holds none, or a name that can't be one.

    section: `teachers` or `students`; example: a name, for the message
    """
    names = list(names)
    if not names:
        raise ValueError(
            f"{section} is empty; give each {section[:-1]} a name: {section}.{example}.name=..., or remove it"
        )
    for name in names:
        if not re.fullmatch(NAME, str(name)):
            raise ValueError(
                f"{section} has the name '{name}'; a name has small letters, digits and _, and begins with a "
                "letter"
            )


def name_teachers(teachers: Mapping[str, NamedTeacherConfig]) -> None:
    """Let each of several teachers know its name.

    Raises ValueError for a name that can't be one, keys that do not go together, and weights that are all 0.
    """
    check_names(teachers, section="teachers", example="dino")
    for name, teacher in teachers.items():
        teacher.called(name)
    if not any(teacher.weight for teacher in teachers.values()):
        raise ValueError(
            f"teachers {', '.join(teachers)} have weight 0, so the student would learn nothing; give one of "
            "them a weight above 0"
        )


def check_one_or_several(values: Mapping[str, object]) -> None:
    """Raise ValueError for a recipe with both `student` and `students`, or both `teacher` and `teachers`.

    values: the recipe's sections as they were read; what an override such as student.depth=2 adds counts too
    """
    for one, several in (("student", "students"), ("teacher", "teachers")):
        if values.get(one) is None or values.get(several) is None:
            continue
        names = ", ".join(map(str, values[several])) if isinstance(values[several], Mapping) else ""
        raise ValueError(
            f"the recipe has both {one} and {several} ({names}); set {one}.KEY of a recipe with one, and "
            f"{several}.NAME.KEY of a recipe with several; to replace one by the other set it to null, "
            f"{one}=null or {several}=null"
        )


def split_name(tap: str) -> tuple[str, str]:
    """Split "dino:block/18" into ("dino", "block/18"); the one teacher of a recipe has the name ""."""
    name, _, place = tap.rpartition(":")
    return (name, place) if name else ("", tap)


def with_name(name: str, tap: str) -> str:
    """Name of a teacher's tap among those of all: "dino:block/18"; of the one teacher "block/18"."""
    return f"{name}:{tap}" if name else tap


def taps_of(name: str, taps: Iterable[str]) -> tuple[str, ...]:
    """Taps of one teacher, without its name, in their order."""
    return tuple(place for owner, place in map(split_name, taps) if owner == name)


def why_not_served(taps: Iterable[str], teachers: Mapping[str, object]) -> str:
    """Why these taps and teachers do not fit together, in one line; "" where they do.

    Every tap must name a teacher of the recipe, and every teacher must have a tap.
    """
    known = ", ".join(teachers)
    for tap in taps:
        owner, place = split_name(tap)
        if owner in teachers:
            continue
        if "" in teachers:
            return f"the tap '{tap}' names a teacher, and the recipe's has no name; write '{place}'"
        named = f"names the teacher '{owner}'" if owner else "names no teacher"
        return f"the tap '{tap}' {named}, and the recipe has teachers {known}; write NAME:{place}"
    idle = [name for name in teachers if not taps_of(name, taps)]
    if idle:
        section = f"teachers.{idle[0]}" if idle[0] else "teacher"
        return f"no term of the objective taps {section}; remove that section, or add a term with such a tap"
    return ""


def warn_of_few_patches(teachers: Iterable[TeacherConfig]) -> str | None:
    """A warning where teachers that were trained on whole images see few patches; None elsewhere."""
    warnings = []
    for teacher in teachers:
        family = teacher.whole_image_family()
        if teacher.sees == "all" or family is None:
            continue
        warnings.append(
            f"{teacher.key('sees')}=visible shows this {family} teacher only the student's patches, and "
            f"it was not trained with dropped tokens; set {teacher.key('sees')}=all"
        )
    return "; ".join(warnings) or None
