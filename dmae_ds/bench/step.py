"""Time of a training step by parts, compared with the fastest matrix product of this device.

    dmae-ds bench step RECIPE [key=value] [--against mae] [--against key=value] [--data] [--rounds 7] [--json]

The step is training's own: the recipe's objective in its DeepSpeed engine, the cut teacher, the mask drawn on
the device. Weights and pixels are random, so no file is needed; with --data images are read and waited for as
in training.

Contestants and the matrix products take turns, round after round; a figure is the median of its rounds, and
the peak is the fastest product of all rounds, by any kernel that a step uses (train/speed.py). The part "ema"
is the forward pass of an EMA teacher, "update" the update of its weights. On several ranks one more step is
taken in which every collective is timed: "exchange", which overlaps the other parts. Work is counted by
torch's FLOP counter on fake tensors (plan/trace.py). Seconds belong to one machine; shares and ratios are
what to look at.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field

import torch

from dmae_ds.bench.family import compare_families, describe_families, family_recipes
from dmae_ds.bench.training_step import TrainingStep
from dmae_ds.config.family import student_names
from dmae_ds.config.objectives import plain_mae
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.distributed.device import hardware_name
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table
from dmae_ds.output.units import GIB
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.geometry import measure as measure_geometry
from dmae_ds.plan.memory import Zero, rank_memory
from dmae_ds.plan.teacher_memory import Placement
from dmae_ds.plan.work import Work, step_work
from dmae_ds.train.cut import CutRecipe
from dmae_ds.train.engine import logged_collectives
from dmae_ds.train.forecast import counted_parts, resolve_micro_batch
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.speed import Speed, Yardstick

PARTS = ("data", "prepare", "teacher", "ema", "forward", "backward", "optimizer", "update")


@dataclass
class Contestant:
    """A recipe's step and its measurements."""

    name: str
    step: TrainingStep
    work: Work  # {part: (FLOP of a step on this rank, dtype of its products)}
    images: int
    first: float  # seconds of the first step
    peak: int | None  # bytes of memory, measured before anything else is built
    predicted: float | None = None  # bytes that the planner expects
    rounds: list[dict[str, float]] = field(default_factory=list)
    exchange: float | None = None  # seconds


def bench_step(
    config: RunConfig,
    world: World,
    *,
    against_mae: bool = False,
    variants: dict[str, RunConfig] | None = None,
    data: bool,
    rounds: int,
    as_json: bool,
) -> str:
    """Measure and return the table, or JSON, to print on rank 0. Collective; makes the process group.

    against_mae: also measure plain MAE's step of the same student
    variants: {name: recipe} of further steps to measure
    data: read the recipe's images
    A family is compared with separate runs of its students (bench/family.py), and with nothing else.
    Raises UserError for a recipe that can't be built, and for plain MAE compared with itself.
    """
    if config.students is not None and (against_mae or variants):
        raise UserError("a family is compared with its students' separate runs; leave --against out")
    if config.students is None and against_mae and config.objective.name == "mae":
        raise UserError(
            "--against mae compares a recipe with plain mae, and this recipe has objective mae; "
            "use a recipe of another objective"
        )
    if config.students is not None:
        recipes = family_recipes(config)
    else:
        recipes = {config.objective.name: config} | (variants or {})
    if against_mae:
        recipes["mae"] = as_plain_mae(config)
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        recipes = with_one_micro_batch(recipes, world, device)
        results = measure_steps(recipes, world, device, data=data, rounds=rounds)
        if config.students is not None:
            results["families"] = compare_families(results["steps"])
        return json.dumps(results) if as_json else table(results)


def with_one_micro_batch(
    recipes: dict[str, RunConfig], world: World, device: torch.device
) -> dict[str, RunConfig]:
    """On GPUs, recipes without an `optim.micro_batch` take the one that is chosen for the first of them.

    The steps share the device's memory. Collective.
    """
    first, *others = recipes.values()
    chosen = resolve_micro_batch(CutRecipe.of(first, world), device, num_steps=len(recipes))[0].config
    optim = {"micro_batch": chosen.optim.micro_batch}
    cut = [one if one.optim.micro_batch else changed(one, optim) for one in others]
    return dict(zip(recipes, [chosen, *cut], strict=True))


def changed(config: RunConfig, optim: dict) -> RunConfig:
    """A recipe with other values of its optim section."""
    return config.model_copy(update={"optim": config.optim.model_copy(update=optim)})


def measure_steps(
    recipes: dict[str, RunConfig], world: World, device: torch.device, *, data: bool, rounds: int
) -> dict:
    """Measure the steps of recipes {name: recipe} within a process group; returns what `table` takes.

    Collective.
    """
    import_deepspeed(device)  # before memory is counted
    contestants = [contestant(name, recipe, world, device, data=data) for name, recipe in recipes.items()]
    dtypes = {dtype for one in contestants for _, dtype in one.work.values()}
    yardsticks = {dtype: Yardstick(dtype, device) for dtype in dtypes}
    take_turns(contestants, yardsticks, rounds=rounds)
    rates = {dtype: yardstick.rate for dtype, yardstick in yardsticks.items()}
    return {
        "recipe": describe(next(iter(recipes.values())), world, contestants[0]),
        "device": hardware_name(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "gemm_gflops": {_short(dtype): rate / 1e9 for dtype, rate in rates.items()},
        "gemm_kernel": {_short(dtype): yardstick.kernel for dtype, yardstick in yardsticks.items()},
        "steps": [figures(one, rates) for one in contestants],
    }


def as_plain_mae(config: RunConfig) -> RunConfig:
    """The same student and batch under plain MAE, with the objective's mask and decoder where it has them."""
    plain = config.model_copy(update={"objective": plain_mae(config.objective), "teacher": None})
    return changed(plain, {"layer_decay": 1.0})  # MAE doesn't tell layers apart


def contestant(name: str, config: RunConfig, world: World, device: torch.device, *, data: bool) -> Contestant:
    """Build one step, take it twice, and read its peak memory."""
    watch = PeakMemory(device)
    step = TrainingStep(config, world=world, device=device, data=data)
    first = sum(step.take().values())  # allocates AdamW's moments, and compiles
    step.take()
    peak = watch.peak() if watch.can_measure else None
    geometry = measure_geometry(config, step.micro_batch)
    work = step_work(config, geometry, step.accumulation)
    predicted = _predict(config, world, step, geometry, gpu=device.type == "cuda")
    return Contestant(name, step, work, config.optim.global_batch, first, peak, predicted)


def _predict(config: RunConfig, world: World, step: TrainingStep, geometry: Geometry, *, gpu: bool) -> float:
    """Bytes that the planner expects this step to take, counted as PeakMemory counts them."""
    memory = rank_memory(
        geometry,
        Zero.of(step.deepspeed),
        precision=config.precision,
        ranks=world.size,
        accumulation=step.accumulation,
        placed=dict.fromkeys(geometry.teachers, Placement()),
        gpu=gpu,
    )
    return sum(getattr(memory, part) for part in counted_parts(gpu=gpu))


def take_turns(
    contestants: list[Contestant], yardsticks: dict[torch.dtype, Yardstick], *, rounds: int
) -> None:
    """Measure every contestant and the matrix products in every round."""
    for _ in range(rounds):
        for yardstick in yardsticks.values():
            yardstick.measure()
        for one in contestants:
            collectives.barrier()
            one.rounds.append(one.step.take())
    for one in contestants:
        collectives.barrier()
        with logged_collectives() as exchanged:
            one.step.take()
        one.exchange = exchanged()


def figures(one: Contestant, rates: dict[torch.dtype, float]) -> dict:
    """Compute a contestant's seconds, GFLOP and share of the peak, by part and for the step."""
    round_seconds = [sum(times.values()) for times in one.rounds]
    seconds = statistics.median(round_seconds)
    parts = {}
    for part in (part for part in PARTS if part in one.rounds[0]):
        spent = statistics.median(times[part] for times in one.rounds)
        parts[part] = {"seconds": spent}
        if part in one.work:
            flops, dtype = one.work[part]
            parts[part] |= {
                "gflop": flops / 1e9,
                "dtype": _short(dtype),
                "of_peak": flops / rates[dtype] / spent,
            }
    speed = Speed(one.work, rates)
    return {
        "name": one.name,
        "seconds": seconds,
        "round_seconds": round_seconds,
        "first_seconds": one.first,
        "exchange_seconds": one.exchange,
        "images_per_s": one.images / seconds,
        "gflop": speed.flops / 1e9,
        "floor_seconds": speed.floor_s,
        "of_peak": speed.at(seconds)["of_peak"],
        "peak_gib": None if one.peak is None else one.peak / GIB,
        "predicted_gib": None if one.predicted is None else one.predicted / GIB,
        "parts": parts,
    }


def table(results: dict) -> str:
    """Text for a person: a table for each contestant, then the ratios to the last one."""
    lines = title_lines(results)
    for step in results["steps"]:
        lines += ["", *_step_lines(step)]
    if "families" in results:
        return "\n".join([*lines, "", *describe_families(results["families"])])
    *others, last = results["steps"]
    if others:
        lines.append("")
    for one in others:
        pairs = zip(one["round_seconds"], last["round_seconds"], strict=True)
        ratios = [one_s / last_s for one_s, last_s in pairs]
        lines.append(
            f"{one['name']} / {last['name']}: {statistics.median(ratios):.3f} of the time "
            f"({min(ratios):.3f} to {max(ratios):.3f} in a round), {one['gflop'] / last['gflop']:.3f} of "
            "the work"
        )
    return "\n".join(lines)


def title_lines(results: dict) -> list[str]:
    """Two lines: the recipe and the device, and the fastest matrix products."""
    rates = ", ".join(
        f"{dtype} {rate:,.0f} GFLOP/s by {results['gemm_kernel'][dtype]}"
        for dtype, rate in results["gemm_gflops"].items()
    )
    return [
        f"{results['recipe']}; {results['device']}, {results['threads']} threads; median of "
        f"{results['rounds']} rounds",
        f"fastest matrix products here: {rates}",
    ]


def _step_lines(step: dict) -> list[str]:
    """A contestant's table, and a line for what has no part."""
    rows = [(step["name"], "seconds", "share", "GFLOP", "dtype", "of peak")]
    for part, row in step["parts"].items():
        counted = ("", "", "")
        if "gflop" in row:
            counted = (f"{row['gflop']:.1f}", row["dtype"], f"{row['of_peak']:.0%}")
        rows.append((part, f"{row['seconds']:.3f}", f"{row['seconds'] / step['seconds']:.1%}", *counted))
    total = (f"{step['seconds']:.3f}", "100.0%", f"{step['gflop']:.1f}", "", f"{step['of_peak']:.0%}")
    rows.append(("step", *total))
    memory = ""
    if step["peak_gib"] is not None:
        memory = f", peak memory {step['peak_gib']:.2f} GiB a rank ({step['predicted_gib']:.2f} predicted)"
    exchange = ""
    if step["exchange_seconds"]:
        exchange = f"; exchange {step['exchange_seconds']:.3f} s, within these parts"
    return [
        *text_table(rows),
        f"{step['images_per_s']:.2f} images/s{memory}; floor {step['floor_seconds']:.3f} s; "
        f"first step {step['first_seconds']:.1f} s{exchange}",
    ]


def describe(config: RunConfig, world: World, one: Contestant) -> str:
    """What was measured, in one line."""
    teacher = "no teacher"
    if config.teacher is not None:
        teacher = f"{config.teacher.name} ({one.step.teacher}, {config.teacher.dtype})"
    kernels = f"; {one.step.kernels}" if one.step.kernels else ""
    return (
        f"{teacher} -> {student_names(config)}, {one.step.objective.describe()}; {one.images} images a step "
        f"on {world.size} ranks; {config.precision}, {config.deepspeed}{kernels}"
    )


def _short(dtype: torch.dtype) -> str:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
    return names[dtype]
