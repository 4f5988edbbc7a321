"""`dmae-ds distill`: from FOLDER, teacher and student to RUN/recipe.yaml, which `dmae-ds train` takes.

Mistakes are found in this order: arguments, teacher and student by their names and headers, then the images
while they become shards. The recipe is written last. A run that was begun keeps its recipe.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml

from dmae_ds.config.distill_rules import OBJECTIVE, Choice, Facts, choose, choose_ranks
from dmae_ds.config.load import build_config, flatten, load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.distill.images import Source, find_source, make_parts
from dmae_ds.distill.request import ASKED, RECIPE, Request, find_begun
from dmae_ds.distributed.world import world_from_env
from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.lines import say


@dataclass(frozen=True)
class Machine:
    """What is here to train on."""

    num_gpus: int
    num_cores: int
    has_bf16: bool

    @classmethod
    def here(cls) -> Machine:
        """Look at this machine."""
        import torch

        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        has_bf16 = all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in range(num_gpus))
        return cls(num_gpus, cores, has_bf16)


def resolve(request: Request) -> tuple[Path, int]:
    """Make shards and recipe, or find those of a run that was begun; returns (the recipe, number of ranks).

    Raises UserError for whatever the user can fix.
    """
    if world_from_env().size > 1:
        raise UserError("dmae-ds distill starts its ranks by itself; start it as one process, with --ranks N")
    recipe = find_begun(request)
    if recipe is not None:
        say(f"continuing with {recipe} and its shards; FOLDER is not read again")
        return recipe, _ranks_of(request, recipe)
    source = find_source(request.images)
    _refuse_unread(request, source)
    say(f"images     {request.images}: {source.text}", dated=False)
    config, facts = _early(request)
    hold_out = not request.gives_val
    train, val = make_parts(source, request.shards_dir, hold_out=hold_out, max_skip=request.max_skip)
    return _write(request, config, facts, train=train, val=val if hold_out else config.data.val)


def _refuse_unread(request: Request, source: Source) -> None:
    """Raise UserError for options on making shards where FOLDER holds nothing but shards."""
    given = {"--shards": request.shards is not None, "--max-skip": request.max_skip > 0}
    if source.has_shards_only and any(given.values()):
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise UserError(f"FOLDER '{request.images}' holds shards, and none are made; remove {names}")


def _early(request: Request) -> tuple[RunConfig, dict]:
    """Check whatever needs no images; returns a recipe without the choices, and the networks' facts."""
    from dmae_ds.distill.networks import find_student, find_teacher, shape_of
    from dmae_ds.objectives.build import build_objective

    values = {
        "run": {"dir": str(request.run_dir)},
        "student": {"name": request.student},
        "teacher": {"name": "found-by-content", "weights": request.teacher},
        "objective": {"name": OBJECTIVE},
        "data": {"train": str(request.shards_dir / "train")},
        "optim": {"warmup_epochs": 0},
    }
    overrides = [word for word in request.all_overrides if word.partition("=")[0] != "run.dir"]
    first = build_config(json.loads(json.dumps(values)), overrides, schema=RunConfig)
    student = find_student(first.student)
    given = {
        key.removeprefix("teacher."): value
        for key, value in _given(first, overrides).items()
        if key.startswith("teacher.")
    }
    teacher = find_teacher(request.teacher, given, student=student)
    values["teacher"] = teacher.section
    config = build_config(values, overrides, schema=RunConfig)
    config.check_teacher()
    build_objective(config, device="meta")  # grids, taps and numbers fit together
    say(f"teacher    {teacher.text}", dated=False)
    say(f"student    {config.student.name}: width {student.embed_dim}, {student.depth} blocks", dated=False)
    facts = {
        "student": shape_of(student),
        "teacher": teacher.shape,
        "drops_tokens": teacher.drops_tokens,
        "can_measure_loss": config.objective.name == OBJECTIVE and config.teacher.placement == "replicated",
    }
    return config, facts


def _write(
    request: Request, config: RunConfig, facts: dict, *, train: str, val: str | None
) -> tuple[Path, int]:
    """Choose what is not given, and write the recipe; returns (the recipe, number of ranks)."""
    machine = Machine.here()
    given = _given(config, request.all_overrides)
    num_ranks = request.ranks or choose_ranks(
        num_gpus=machine.num_gpus, num_cores=machine.num_cores, global_batch=given.get("optim.global_batch")
    )
    if val is None:
        facts = {**facts, "can_measure_loss": False}
    num_images = ShardSet.open(train, label="data.train").num_samples
    choices = choose(
        Facts(num_images=num_images, num_ranks=num_ranks, **facts, **vars(machine)),
        given,
        has_decoder="decoder" in type(config.objective).model_fields,
    )
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] |= {"train": train, "val": val}
    del values["optim"]["warmup_epochs"]
    for choice in choices:
        _set(values, choice.key, choice.value)
    final = build_config(json.loads(json.dumps(values)), request.all_overrides, schema=RunConfig)
    final = final.model_copy(update={"run": final.run.model_copy(update={"dir": str(request.run_dir)})})
    lines = _describe(choices, num_images=num_images, num_ranks=num_ranks, machine=machine)
    for line in lines:
        say(line, dated=False)
    return _save(request, final, lines), num_ranks


def _save(request: Request, config: RunConfig, lines: list[str]) -> Path:
    run_dir = request.run_dir
    recipe = run_dir / RECIPE
    comment = [f"Made by dmae-ds distill. To train it: dmae-ds train {recipe} --resume auto", "", *lines]
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment)
    text += yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        recipe.unlink(missing_ok=True)  # never one recipe with the arguments of another
        write_atomically(run_dir / ASKED, json.dumps(request.asked(), indent=1).encode())
        write_atomically(recipe, text.encode())
    except OSError as error:
        raise UserError(
            f"run.dir '{run_dir}' cannot be written ({error.strerror}); set run.dir= to a folder that can be"
        ) from None
    say(f"recipe     {recipe}", dated=False)
    return recipe


def _describe(choices: list[Choice], *, num_images: int, num_ranks: int, machine: Machine) -> list[str]:
    """The choices with their reasons, a line or two each."""
    place = f"{machine.num_gpus} GPUs" if machine.num_gpus else f"{machine.num_cores} CPU cores"
    lines = [f"chosen for {num_images:,} training images, {place}, ranks: {num_ranks}:"]
    for key, value, reason in choices:
        name = f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        wrapped = textwrap.wrap(reason, width=70)
        lines += [f"  {name:<36}{wrapped[0]}", *(f"{'':<38}{line}" for line in wrapped[1:])]
    return lines


def _given(config: RunConfig, overrides: list[str]) -> dict[str, object]:
    """The values of all keys that the overrides set, alone or as part of a section."""
    named = {override.partition("=")[0] for override in overrides}
    return {
        key: value
        for key, value in flatten(config.model_dump(mode="json")).items()
        if any(key == name or key.startswith(f"{name}.") for name in named)
    }


def _set(values: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _ranks_of(request: Request, recipe: Path) -> int:
    """Ranks for a recipe that exists: as asked, or as many of this machine's as divide its batch."""
    machine = Machine.here()
    batch = load_config(str(recipe)).optim.global_batch
    return request.ranks or choose_ranks(
        num_gpus=machine.num_gpus, num_cores=machine.num_cores, global_batch=batch
    )
