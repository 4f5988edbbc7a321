"""Summary of what a run is about to do, printed for a person to read before it costs anything."""

from __future__ import annotations

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.needs import View
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.teacher.grid import explain_grids
from dmae_ds.teacher.stored import StoredTeacher
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher
from dmae_ds.train.learning_rate import describe_repeats, peak_lr
from dmae_ds.train.networks import Teacher, teachers_in
from dmae_ds.train.preflight import Preflight


def summary(
    preflight: Preflight,
    objective: Objective,
    teacher: Teacher,
    ema: EmaTeacher | NoEmaTeacher,
    *,
    placement: str,
    kernels: str,
    batch: str,
) -> str:
    """Write the summary, one row a line. Call it before ZeRO partitions the parameters.

    placement, batch: why the teacher is placed and the batch is cut as they are; kernels: see kernels.py;
        each may be empty
    """
    config, shards = preflight.config, preflight.shards
    of_teacher = describe_teacher(config, objective, teacher)
    if preflight.replay is not None:
        of_teacher["replay"] = describe_replay(preflight)
    of_students, of_objectives = {}, {}
    for name, member in objective.members().items():
        alone = preflight.members[name]
        of_students[f"student {name}".rstrip()] = describe_student(alone, member)
        of_objectives[f"objective {name}".rstrip()] = f"{alone.objective.name}: {member.describe()}"
    repeats = describe_repeats(config.optim.global_batch, preflight.num_images, repeat=config.data.repeat)
    images = f"{preflight.num_images:,} images"
    if config.data.share < 1:
        images += f" of {shards.num_samples:,} (data.share)"
    rows = {
        "run": f"{preflight.run_dir} {_describe_start(preflight)}, seed {config.run.seed}",
        "data": f"{images}, {len(shards.classes)} classes; {shards.order_guarantee}",
        "reading": describe_reading(preflight),
        **of_students,
        **of_teacher,
        **of_objectives,
        "passes": describe_passes(objective),
        "ema": str(ema),
        "views": describe_views(objective.views),
        "batch": "; ".join(filter(None, [describe_batch(preflight), batch])),
        "schedule": describe_schedule(preflight),
        "engine": f"DeepSpeed {config.deepspeed}, {config.precision}",
        "kernels": kernels,
        "placement": placement,
        "WARNING": "; ".join(filter(None, [of_teacher.get("WARNING"), repeats])),
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items() if text)


def describe_reading(preflight: Preflight) -> str:
    """Row that proposes larger reads from URLs; empty for folders, and where blocks are read."""
    data, shards = preflight.config.data, preflight.shards
    is_remote = isinstance(shards, ShardSet) and shards.tars.is_remote
    if not is_remote or data.block > 1:
        return ""
    often = "in the first epoch" if data.cache_dir else "in every epoch"
    text = f"data.block=1 makes a request for each image {often}; data.block=16 makes a sixteenth as many"
    return text if data.cache_dir else f"{text}, and data.cache_dir=FOLDER keeps what was read"


def _describe_start(preflight: Preflight) -> str:
    return f"resumes from {preflight.resume_from.name}" if preflight.resume_from else "starts"


def describe_student(config: RunConfig, objective: Objective) -> str:
    """Row of the student: its size, the size of what is trained with it, and the weights it starts from."""
    student = sum(parameter.numel() for parameter in objective.student.parameters())
    rest = sum(parameter.numel() for parameter in objective.parameters()) - student
    text = f"{config.student.name}, {student / 1e6:.1f} M parameters; decoder and heads {rest / 1e6:.1f} M"
    if config.student.weights:
        text += f"; begins with {config.student.weights}"
        text += f" ({objective.initial_notes})" if objective.initial_notes else ""
    return text


def describe_passes(objective: Objective) -> str:
    """Row of the teacher's passes, where students show it different patches; empty where it has one."""
    readers: dict[int, list[str]] = {}
    for name, number in objective.pass_of.items():
        readers.setdefault(number, []).append(name)
    if len(readers) < 2:
        return ""
    texts = [f"{number + 1} for {', '.join(names)}" for number, names in readers.items()]
    return f"{len(readers)} of the teacher for each image, of different patches: {'; '.join(texts)}"


def describe_batch(preflight: Preflight) -> str:
    """Row of the batch: how it is divided over ranks and micro-batches."""
    optim = preflight.config.optim
    text = (
        f"{optim.global_batch} = {preflight.world.size} ranks x {preflight.micro_batch} images "
        f"x {preflight.accumulation} accumulated"
    )
    if optim.micro_batch not in (None, preflight.micro_batch):
        text += f" (of at most optim.micro_batch {optim.micro_batch})"
    return text


def describe_schedule(preflight: Preflight) -> str:
    """Row of the schedule: steps, epochs and the peak learning rate."""
    optim = preflight.config.optim
    return (
        f"{preflight.num_steps:,} steps = {optim.epochs:g} epochs ({optim.warmup_epochs:g} warm-up), "
        f"lr {peak_lr(optim):.3g} = {optim.base_lr:g} x {optim.global_batch} / 256"
    )


def describe_views(views: tuple[View, ...]) -> str:
    """Row of the crops of an image; empty where there is only the plain one."""
    if views == (View(),):
        return ""
    texts = [_describe_view(view) for view in views]
    counts = [f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts)]
    return f"{len(views)} of each image: {'; '.join(counts)}"


def _describe_view(view: View) -> str:
    if view.copy_of is not None:
        return f"the crop of number {view.copy_of + 1}, {view.photometric}"
    size = "own size" if view.size is None else f"{view.size} px"
    scale = "data.crop_scale" if view.scale is None else "{:g} to {:g} of the area".format(*view.scale)
    return f"{size}, {scale}, {view.photometric}"


def describe_replay(preflight: Preflight) -> str:
    """Row of a cache of features that is shorter than the run."""
    return (
        f"stored features are of the first {preflight.replay:,} of {preflight.num_steps:,} steps: their "
        "images, crops and masks come again, in their order"
    )


def describe_teacher(config: RunConfig, objective: Objective, teacher: Teacher) -> dict[str, str]:
    """Rows of the teachers: what was built and left in the file, how the grids meet, notes, warnings.

    With several teachers a row has a part for each, which begins with its name.
    """
    built = teachers_in(teacher)
    if not built:
        return {"teacher": str(teacher)}
    rows: dict[str, list[str]] = {}
    for name, one in built.items():
        for row, text in _rows_of(config.named_teachers()[name], objective, one).items():
            rows.setdefault(row, []).append(f"{name}: {text}" if name else text)
    warnings = [*rows.pop("WARNING", []), *filter(None, [config.teacher_warning()])]
    for section in config.named_teachers().values():
        if section.dtype == "fp8" and not config.compile:
            # Counted on fake tensors: 42 kernels a block, which torch.compile fuses; bf16 has 10.
            warnings.append(
                f"{section.key('dtype')} fp8 without compile runs four times the kernels of bf16 and is the "
                f"slower of the two; set compile=true, or {section.key('dtype')}=bf16"
            )
    return {name: "; ".join(texts) for name, texts in {**rows, "WARNING": warnings}.items() if texts}


def _rows_of(
    section: TeacherConfig, objective: Objective, teacher: FrozenTeacher | StoredTeacher
) -> dict[str, str]:
    """Rows of one teacher, those with something to say."""
    if isinstance(teacher, StoredTeacher):
        return {"teacher": f"{section.name}, {teacher}"}
    student = objective.student
    rows = {"teacher": f"{section.name}, {teacher}, {section.dtype}, sees {section.sees} patches"}
    dropped = teacher.parts.describe_dropped()
    if dropped:
        seen = {"visible": objective.num_visible, "all": student.num_patches}
        tokens = 1 + seen.get(teacher.sees, teacher.sees)
        saved = teacher.parts.saved_compute(tokens=tokens, num_patches=student.num_patches)
        rows["left out"] = f"{dropped}; {saved:.0%} of the whole teacher's compute"
    rows["grids"] = explain_grids(
        grid=student.grid, student_patch=student.patch_size, teacher_patch=teacher.vit.patch_size
    )
    if section.standardize != "none":
        rows["targets"] = f"features standardised: {section.standardize}"
    if getattr(section, "weight", 1.0) != 1.0:
        rows["targets"] = "; ".join(filter(None, [rows.get("targets"), f"weight {section.weight:g}"]))
    notes = teacher.parts.notes
    rows["checked"] = "; ".join(note for note in notes if not note.startswith("WARNING"))
    rows["WARNING"] = "; ".join(
        note.removeprefix("WARNING: ") for note in notes if note.startswith("WARNING")
    )
    return {name: text for name, text in rows.items() if text}
