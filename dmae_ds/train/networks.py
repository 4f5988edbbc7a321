"""Building a run's networks: the objective with its initial weights, and the frozen teacher it asks for."""

from __future__ import annotations

import json

import torch

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.config.teachers import taps_of
from dmae_ds.data.storage import Access
from dmae_ds.distributed import collectives
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import TeacherShape, build_objective
from dmae_ds.objectives.initial import fill_student
from dmae_ds.teacher.build import load_frozen_teacher, naming, verify
from dmae_ds.teacher.cache_manifest import check_same
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher
from dmae_ds.teacher.passes import TeacherPasses
from dmae_ds.teacher.pipeline import StageGroup, join_group
from dmae_ds.teacher.several import SeveralTeachers
from dmae_ds.teacher.stored import StoredTeacher
from dmae_ds.train.engine import check_ops, check_precision
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.stored_inputs import inputs_identity
from dmae_ds.weights.label import of_student

Teacher = FrozenTeacher | StoredTeacher | SeveralTeachers | TeacherPasses | NoTeacher


def build_networks(
    preflight: Preflight, device: torch.device, *, only: str | None = None
) -> tuple[Objective, Teacher]:
    """Build the objective with its initial weights and the teachers it asks for, and check the teachers.

    Collective.
    only: the name of the one teacher that is built, by itself; None: all
    """
    config, num_classes = preflight.config, preflight.num_classes
    # Process groups are made before anything that may fail on one rank alone.
    groups = join_groups(config)

    def build():
        check_precision(config.precision, device)
        check_ops(preflight.deepspeed, device)
        objective, shapes = build_objective(config, num_classes=num_classes)
        for name, member in objective.members().items() if preflight.resume_from is None else ():
            network = preflight.members[name].student
            if network.weights is not None:
                filled = fill_student(member.student, network.weights, network, label=of_student(name))
                member.initial_notes = filled
        taps = objective.taps
        teacher = build_teacher(config, shapes, taps, device, groups, num_classes=num_classes, only=only)
        check_inputs(config, objective, teachers_in(teacher, only=only))
        return objective, teacher

    objective, teacher = collectives.raise_on_all_ranks(build)
    for name, one in teachers_in(teacher, only=only).items():
        if isinstance(one, StoredTeacher):
            continue  # `prepare` and `check_inputs` have checked it
        section = config.named_teachers()[name]
        collectives.raise_on_all_ranks(lambda one=one, section=section: verify_named(one, section))
    return objective, teacher if only is not None else objective.in_passes(teacher)


def verify_named(teacher: FrozenTeacher, section: TeacherConfig) -> None:
    """Check a teacher, and read its statistics; messages name it. Collective as `verify` is."""
    with naming(section):
        verify(teacher, section)


def join_groups(config: RunConfig) -> dict[int, StageGroup]:
    """Make the process groups of pipelined teachers: {number of stages: this rank's group}. Collective."""
    teachers = config.named_teachers().values()
    lengths = {teacher.stages for teacher in teachers if teacher.placement == "pipeline"}
    return {stages: join_group(stages) for stages in sorted(lengths)}


def teachers_in(teacher: Teacher, *, only: str | None = None) -> dict[str, FrozenTeacher | StoredTeacher]:
    """The teachers by name, as `RunConfig.named_teachers` names them."""
    if isinstance(teacher, TeacherPasses):
        teacher = teacher.teacher
    if isinstance(teacher, SeveralTeachers):
        return teacher.teachers
    return {} if isinstance(teacher, NoTeacher) else {only or "": teacher}


def build_teacher(
    config: RunConfig,
    shapes: dict[str, TeacherShape],
    taps: tuple[str, ...],
    device: torch.device,
    groups: dict[int, StageGroup] | None = None,
    *,
    num_classes: int | None = None,
    only: str | None = None,
) -> Teacher:
    """Build the teachers that the taps ask for, each cut after the deepest of its own. No collective.

    shapes: by name, as `build_objective` gives them
    groups: of pipelined teachers, by their numbers of stages; only this rank's stages are built
    only: the name of the one teacher that is built; None: all
    """
    built, access = {}, Access.of(config.data)
    for name, teacher in config.named_teachers().items():
        if only not in (None, name):
            continue
        with naming(teacher):
            if teacher.placement == "cache":
                own = taps_of(name, taps)
                built[name] = StoredTeacher(teacher.cache, own, access=access, device=device)
                continue
            built[name] = load_frozen_teacher(
                teacher,
                taps=taps_of(name, taps),
                whole_blocks=shapes[name].depth,
                mean=config.data.mean,
                std=config.data.std,
                device=device,
                group=(groups or {}).get(teacher.stages),
                sharded=teacher.placement == "zero3",
                num_classes=num_classes,
            )
    if config.teachers is not None and only is None:
        return SeveralTeachers(built)
    if only is not None:
        return built[only]
    return built.get("") or NoTeacher()


def check_inputs(
    config: RunConfig, objective: Objective, teachers: dict[str, FrozenTeacher | StoredTeacher]
) -> None:
    """Raise UserError where stored features are of other views or masks than the objective's."""
    for name, teacher in teachers.items():
        if isinstance(teacher, StoredTeacher):
            now = json.loads(json.dumps(inputs_identity(objective, config)))
            key = config.named_teachers()[name].key("cache")
            check_same(teacher.manifest.inputs, now, where=f"{key} '{teacher.location}'")
