"""Build the objective that a recipe trains, with its student and the shape of its teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from dmae_ds.config.data import DataConfig
from dmae_ds.config.family import members_of, told_by
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.config.teachers import taps_of, why_not_served
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.models.decoder import TokenDecoder
from dmae_ds.models.vit import MaskedViT, build_student, build_timm_vit
from dmae_ds.objectives import find_objective
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.family import Family, check_repeat
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.frozen import meta_teacher, split_tap
from dmae_ds.teacher.grid import check_grids
from dmae_ds.teacher.output import OUTPUT_TAPS, check_output
from dmae_ds.teacher.relation import why_no_relation

IMAGENET_CLASSES = 1000


def build_objective(
    config: RunConfig, *, num_classes: int | None = None, device: str = "cpu"
) -> tuple[Objective, dict[str, TeacherShape]]:
    """Return the objective with its student, and the shapes of its teachers by name (config/run.py).

    run.seed alone determines the initial weights, the same on every rank; student.weights is not read here.
    num_classes: of the labels, for an objective whose schema says `needs_labels`; None: what `count_classes`
        gives
    device: `meta` for its geometry without a byte of weights
    Raises UserError (one line) for numbers that don't fit together.
    """
    if config.students is not None:
        return _build_family(config, num_classes=num_classes, device=device)
    generator = torch.Generator().manual_seed(config.run.seed)
    student = build_student(
        config.student.name, config.student.overrides(), generator=generator, device=device
    )
    kwargs = {"student": student, "generator": generator}
    if config.objective.needs_labels:
        kwargs["num_classes"] = num_classes or count_classes(config.data)
    shapes = {name: shape_of(teacher, student) for name, teacher in config.named_teachers().items()}
    if shapes:
        check_served(config, config.objective.tapped)
    if config.objective.takes_several_teachers:
        kwargs["teachers"] = shapes
    elif config.teacher is not None:
        kwargs["teacher"] = shapes[""]
    with torch.device(device):
        objective = find_objective(config.objective.name)(config.objective, **kwargs)
    for module in objective.modules():
        if isinstance(module, (MaskedViT, TokenDecoder)):
            module.checkpoint_blocks = config.student.checkpoint_blocks
    check_teachers(config, objective, shapes)
    return objective, shapes


def shape_of(config: TeacherConfig, student: MaskedViT) -> TeacherShape:
    """Return what an objective knows of a teacher. Raises UserError where its grid is not the student's."""
    teacher = meta_teacher(config.name, config.overrides(), where=config.section)
    check_grids(
        student_grid=student.grid,
        student_patch=student.patch_size,
        teacher_grid=teacher.grid,
        teacher_patch=teacher.patch_size,
        section=config.section,
    )
    return TeacherShape(
        teacher.depth,
        teacher.embed_dim,
        config.decoder_depth,
        config.decoder_embed_dim,
        teacher.patch_size,
        has_cls=teacher.cls_token is not None,
        num_heads=getattr(teacher.blocks[0].attn, "num_heads", 0),
        num_superset=num_superset(config, teacher.num_patches),
        weight=getattr(config, "weight", 1.0),
    )


def check_teachers(config: RunConfig, objective: Objective, shapes: dict[str, TeacherShape]) -> None:
    """Raise UserError where an objective's taps and the recipe's teachers do not fit together."""
    teachers = config.named_teachers()
    if not teachers:
        check_taps(objective.taps, None)
        return
    check_served(config, objective.taps)
    for name, teacher in teachers.items():
        taps = taps_of(name, objective.taps)
        check_taps(taps, shapes[name], section=teacher.section)
        check_network(teacher, taps)
        check_teacher_keys(teacher, taps)
        check_superset(objective, shapes[name], section=teacher.section)


def check_served(config: RunConfig, taps: tuple[str, ...]) -> None:
    """Raise UserError where a tap names no teacher of the recipe, or a teacher has no tap."""
    if config.teachers is not None:
        config.check_teacher()
    problem = why_not_served(taps, config.named_teachers()) if taps else ""
    if problem:
        raise UserError(f"objective.name {config.objective.name}: {problem}")


def _build_family(
    config: RunConfig, *, num_classes: int | None, device: str
) -> tuple[Family, dict[str, TeacherShape]]:
    """Return the objective of several students, each built as it would be alone."""
    objectives: dict[str, Objective] = {}
    shapes: dict[str, TeacherShape] = {}
    members = members_of(config)
    for name, member in members.items():
        with told_by(name):
            objectives[name], of_member = build_objective(member, num_classes=num_classes, device=device)
        shapes |= of_member
    family = Family(objectives, {name: member.objective for name, member in members.items()})
    check_repeat(family, config.data.repeat)
    return family, shapes


def num_superset(teacher: TeacherConfig, num_patches: int) -> int:
    """Return the number of patches that a teacher with teacher.sees=superset sees; 0 for others."""
    seen = seen_patches(teacher, num_patches)
    return 0 if isinstance(seen, str) else seen


def check_superset(objective: Objective, shape: TeacherShape, *, section: str = "teacher") -> None:
    """Raise UserError where the teacher's superset has no further patch, or the objective compares none."""
    if not shape.num_superset:
        return
    if not objective.compares_superset:
        raise UserError(
            f"{section}.sees=superset requires an objective that compares patches which only the teacher "
            f"sees; set {section}.sees=visible or all, or choose another objective.name"
        )
    if shape.num_superset <= objective.num_visible:
        raise UserError(
            f"{section}.sees=superset shows the teacher {shape.num_superset} patches ({section}.mask_ratio), "
            f"and the student sees {objective.num_visible} (objective.mask_ratio); set {section}.mask_ratio "
            f"below the student's, or {section}.sees=visible"
        )


def check_network(teacher: TeacherConfig, taps: tuple[str, ...]) -> None:
    """Raise UserError for a tap of the output or of relations that the teacher's network does not give."""
    kinds = {split_tap(tap)[0] for tap in taps}
    if not kinds & {"relation", *OUTPUT_TAPS}:
        return
    vit = build_timm_vit(teacher.name, teacher.overrides(), depth=1, where=teacher.section)
    outputs = tuple(tap for tap in taps if tap in OUTPUT_TAPS)
    check_output(teacher.name, vit, outputs, section=teacher.section)
    reason = why_no_relation(vit.blocks[0]) if "relation" in kinds else ""
    if reason:
        raise UserError(
            f"the objective taps a relation, and {teacher.key('name')} '{teacher.name}' {reason}; choose "
            "another teacher, or another objective.name"
        )


def check_taps(taps: tuple[str, ...], shape: TeacherShape | None, *, section: str = "teacher") -> None:
    """Raise UserError for a tap that the teacher does not have, or where there is no teacher."""
    for tap in taps:
        kind, number = split_tap(tap)
        if shape is None:
            raise UserError(
                f"the objective taps '{tap}' of a teacher, and the recipe has none; give teacher.name and "
                "teacher.weights, and set needs_teacher in the objective's Config"
            )
        depth = shape.decoder_depth if kind == "decoder" else shape.depth
        if number > depth:
            raise UserError(
                f"the objective taps '{tap}' of `{section}`, which has {kind}/1 to {kind}/{depth}"
            )


def check_teacher_keys(teacher: TeacherConfig, taps: tuple[str, ...]) -> None:
    """Raise UserError for keys of the teacher's section that have no effect with these taps."""
    kinds = {split_tap(tap)[0] for tap in taps}
    of_the_decoder = ("decoder_depth", "decoder_embed_dim", "decoder_num_heads")
    for names, needed, tapped in (
        (of_the_decoder, {"decoder", "prediction"}, "the teacher's decoder"),
        (("pool",), {"logits"}, "a classifier's logits"),
    ):
        for name in names:
            if getattr(teacher, name) != type(teacher).model_fields[name].default and not kinds & needed:
                raise UserError(
                    f"{teacher.key(name)} requires an objective that taps {tapped}; "
                    "remove it, or choose another objective.name"
                )
    if teacher.standardize != "none" and kinds & {"prediction", "logits", "relation"}:
        raise UserError(
            f"{teacher.key('standardize')} {teacher.standardize} is for features, and the objective taps "
            f"{', '.join(taps)}; set {teacher.key('standardize')}=none"
        )


def count_classes(data: DataConfig) -> int:
    """Return the number of classes of data.train, or ImageNet-1k's where it is not on this machine.

    `dmae-ds plan` counts images by the same rule.
    """
    here = "://" not in data.train and Path(data.train).expanduser().exists()
    return len(ShardSet.open(data.train, label="data.train").classes) if here else IMAGENET_CLASSES
