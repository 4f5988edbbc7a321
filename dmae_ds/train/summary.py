"""What a run is about to do, in lines for a person to read before it costs anything."""

from __future__ import annotations

from dmae_ds.config.run import RunConfig
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.needs import View
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher
from dmae_ds.teacher.grid import explain_grids
from dmae_ds.train.ema import EmaTeacher
from dmae_ds.train.optim import peak_lr
from dmae_ds.train.preflight import Preflight


def summary(
    preflight: Preflight,
    objective: Objective,
    teacher: FrozenTeacher | NoTeacher,
    ema: EmaTeacher | None,
    *,
    placed: str,
    kernels: str,
) -> str:
    """The whole of it, a row a line. Call it before ZeRO cuts the parameters up.

    placed: why the teacher lives where it does; kernels: see train/kernels.py; either may be empty
    """
    config, world, shards = preflight.config, preflight.world, preflight.shards
    student = sum(parameter.numel() for parameter in objective.student.parameters())
    rest = sum(parameter.numel() for parameter in objective.parameters()) - student
    optim, start = (
        config.optim,
        f"resumes from {preflight.resume_from.name}" if preflight.resume_from else "starts",
    )
    rows = {
        "run": f"{preflight.run_dir} {start}, seed {config.run.seed}",
        "data": f"{shards.num_samples:,} images, {len(shards.classes)} classes; {shards.order_guarantee}",
        "student": f"{config.student.name}, {student / 1e6:.1f} M parameters; decoder and heads {rest / 1e6:.1f} M"
        + (f"; begins with {config.student.weights}" if config.student.weights else ""),
        **describe_teacher(config, objective, teacher),
        "objective": f"{config.objective.name}: {objective.describe()}",
        "ema": "" if ema is None else str(ema),
        "views": describe_views(objective.views),
        "batch": f"{optim.global_batch} = {world.size} ranks x {preflight.micro_batch} images x {preflight.accumulation} accumulated"
        + (
            f" (of at most optim.micro_batch {optim.micro_batch})"
            if optim.micro_batch not in (None, preflight.micro_batch)
            else ""
        ),
        "schedule": f"{preflight.num_steps:,} steps = {optim.epochs:g} epochs ({optim.warmup_epochs:g} warm-up), "
        f"lr {peak_lr(optim):.3g} = {optim.base_lr:g} x {optim.global_batch} / 256",
        "engine": f"DeepSpeed {config.deepspeed}, {config.precision}",
        "kernels": kernels,
        "placement": placed,
    }
    return "\n".join(f"{name:<10}{text}" for name, text in rows.items() if text)


def describe_views(views: tuple[View, ...]) -> str:
    """The crops of a picture, where there is more than the plain one."""
    if views == (View(),):
        return ""
    words = [
        f"{'own size' if view.size is None else f'{view.size} px'}, {'data.crop_scale' if view.scale is None else '{:g} to {:g} of the area'.format(*view.scale)}, {view.photometric}"
        for view in views
    ]
    return f"{len(views)} of each picture: " + "; ".join(
        f"{words.count(text)} x ({text})" for text in dict.fromkeys(words)
    )


def describe_teacher(
    config: RunConfig, objective: Objective, teacher: FrozenTeacher | NoTeacher
) -> dict[str, str]:
    """Rows of the summary: what was built, what stays in the file and saves, how the grids meet, what was noticed."""
    if config.teacher is None:
        return {"teacher": str(teacher)}
    student, sees = objective.student, config.teacher.sees
    rows = {"teacher": f"{config.teacher.name}, {teacher}, {config.teacher.dtype}, sees {sees} patches"}
    left = teacher.parts.describe_dropped()
    if left:
        tokens = 1 + (student.num_patches if sees == "all" else objective.num_visible)
        rows["left out"] = (
            f"{left}; {teacher.parts.saved_compute(tokens=tokens, num_patches=student.num_patches):.0%} of the whole teacher's compute"
        )
    rows["grids"] = explain_grids(
        grid=student.grid, student_patch=student.patch_size, teacher_patch=teacher.vit.patch_size
    )
    rows["targets"] = (
        "" if config.teacher.standardize == "none" else f"features standardised: {config.teacher.standardize}"
    )
    rows["checked"] = "; ".join(note for note in teacher.parts.notes if not note.startswith("WARNING"))
    rows["WARNING"] = "; ".join(
        note.removeprefix("WARNING: ") for note in teacher.parts.notes if note.startswith("WARNING")
    )
    return {name: text for name, text in rows.items() if text}
