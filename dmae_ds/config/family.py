"""A family: several students of one run, each the student that it would have been alone.

`students: {small: {...}, base: {...}}` stands instead of `student`. `members_of` gives the recipe of each
member alone, by which its network is built, and which its folder RUN/<name> keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.config.networks import StudentConfig
from dmae_ds.config.objectives import ObjectiveConfig, ObjectiveSection
from dmae_ds.config.teachers import check_names, split_name
from dmae_ds.errors import UserError

if TYPE_CHECKING:
    from dmae_ds.config.run import RunConfig

# Names that files of a run folder and parts of metrics.jsonl have.
RESERVED = {
    *("checkpoints", "tensorboard", "wandb", "lock"),
    *("accuracy", "align", "dense", "knn", "norm", "rank", "seconds", "share", "spread", "val"),
}


class MemberConfig(StudentConfig):
    """One of several students, by its name: the keys of `student`, and its objective."""

    objective: ObjectiveConfig | None = None  # a section of its own; null: the recipe's


def check_family(config: RunConfig) -> None:
    """Raise ValueError unless a recipe has one student or several, each with an objective that fits."""
    if config.student is None and config.students is None:
        raise ValueError("student is missing; set it in the recipe or as student=...")
    if config.students is None:
        if config.objective is None:
            raise ValueError("objective is missing; set it in the recipe or as objective=...")
        return
    _check_names(config.students)
    for name, member in config.students.items():
        if member.objective is None and config.objective is None:
            raise ValueError(
                f"students.{name}.objective is missing, and the recipe has none; give one of the two"
            )
    if config.objective is not None and all(member.objective for member in config.students.values()):
        raise ValueError(
            "objective is used by no student, for each of `students` has its own; remove one of them"
        )


def _check_names(names: Iterable[str]) -> None:
    check_names(names, section="students", example="small")
    for name in names:
        if name in RESERVED:
            raise ValueError(f"students has the name '{name}', which a run folder uses; choose another")


def members_of(config: RunConfig) -> dict[str, RunConfig]:
    """The recipe of each student alone, by name and in the recipe's order; {"": the recipe} of one student.

    A member's run folder is RUN/<name>; a teacher that it does not use is left out.
    """
    if config.students is None:
        return {"": config}
    members = {}
    for name, member in config.students.items():
        keys = member.model_dump(exclude={"objective"}, exclude_unset=True)
        objective = member.objective or config.objective
        alone = {
            "student": StudentConfig.model_validate(keys),
            "students": None,
            "objective": objective,
            "run": config.run.model_copy(update={"dir": str(Path(config.run.dir) / name)}),
        }
        if not objective.needs_teacher:
            alone |= {"teacher": None, "teachers": None}
        elif config.teachers is not None:
            owners = {split_name(tap)[0] for tap in objective.tapped}
            used = {name: teacher for name, teacher in config.teachers.items() if name in owners}
            alone["teachers"] = used or config.teachers  # an objective of your own may not name its taps
        members[name] = config.model_copy(update=alone)
    return members


def check_one_student(config: RunConfig, command: str) -> None:
    """Raise UserError for a family, whose recipe a command does not take."""
    if config.students is not None:
        raise UserError(
            f"{command} takes the recipe of one student, and this one has students "
            f"{', '.join(config.students)}; give one of them as `student`"
        )


def student_names(config: RunConfig) -> str:
    """The students' networks, such as "vit_small_patch16_224", of a family with the students' names."""
    return ", ".join(f"{name} {one.student.name}".strip() for name, one in members_of(config).items())


def objectives_of(config: RunConfig) -> list[ObjectiveSection]:
    """The objectives of all students; one for each."""
    return [member.objective for member in members_of(config).values()]


def key_of(name: str, key: str) -> str:
    """A student's key for messages: "student.weights", of a member "students.small.weights"."""
    return f"students.{name}.{key}" if name else f"student.{key}"


def name_of_part(kind: str, name: str, members: Iterable[str]) -> str:
    """Name of a number of a kind: "val/pixel" of "pixel", "small/val/pixel" of a member's "small/pixel"."""
    owner, _, part = name.partition("/")
    return f"{prefix_of(owner)}{kind}/{part}" if owner in members else f"{kind}/{name}"


@contextmanager
def told_by(name: str) -> Iterator[None]:
    """Let an error about a member of a family begin with its section: "students.small: ..."."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        told = UserError(f"students.{name}: {error}")
        told.__dict__.update(error.__dict__)
        raise told from None


def prefix_of(name: str) -> str:
    """How names of a member's metrics and tensors begin: "small/"; empty for the one student of a run."""
    return f"{name}/" if name else ""
