"""Where a training step's time goes, and how near it is to the fastest matrix product of this device.

    dmae-ds bench step RECIPE [key=value] [--against mae] [--against key=value] [--data] [--rounds 7] [--json]

The step is training's own: the recipe's objective in its DeepSpeed engine, the cut teacher, the mask drawn on the device;
weights and pixels are random, so no file is needed. With --data the pictures are read, and waited for, as in training. On
several ranks one more step is taken in which every collective is timed: "exchange", a share of the other parts. Contestants and the matrix products take turns, round after round; a figure is the median of its rounds. "ema" is what an EMA teacher makes of a batch, "update" its following the student.
Work is counted by torch's own FLOP counter on fake tensors (plan/trace.py). Seconds belong to one machine; shares and
ratios are what to look at.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field

import torch

from dmae_ds.bench.training_step import TrainingStep
from dmae_ds.config.objectives import plain_mae
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.distributed.device import hardware_name
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table
from dmae_ds.output.units import GIB
from dmae_ds.plan.geometry import measure as measure_geometry
from dmae_ds.plan.work import Work, step_work
from dmae_ds.train.engine import logged_collectives
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.speed import Speed, gemm_rate

PARTS = ("data", "prepare", "teacher", "ema", "forward", "backward", "optimizer", "update")


@dataclass
class Contestant:
    """One recipe's step.

    work: {part: (FLOP of a step on this rank, dtype of its products)}; first: seconds of the first step; peak: bytes, nothing else being built
    """

    name: str
    step: TrainingStep
    work: Work
    images: int
    first: float
    peak: int | None
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
    """Measure and return the table, or JSON, to print on rank 0. Collective; the process group is made here.

    against_mae: measure plain MAE's step of the same student beside it; variants: {name: recipe} of further steps beside it; data: read the recipe's pictures
    Raises UserError for a recipe that can't be built, and for plain MAE beside itself.
    """
    if against_mae and config.objective.name == "mae":
        raise UserError(
            "--against mae compares a recipe with plain mae, and this recipe is that; take one of another objective"
        )
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        import_deepspeed(device)  # before memory is counted
        recipes = (
            {config.objective.name: config}
            | (variants or {})
            | ({"mae": as_plain_mae(config)} if against_mae else {})
        )
        contestants = [contestant(name, recipe, world, device, data=data) for name, recipe in recipes.items()]
        dtypes = {dtype for one in contestants for _, dtype in one.work.values()}
        rates = take_turns(
            contestants, {dtype: gemm_rate(dtype, device) for dtype in dtypes}, rounds=rounds, device=device
        )
        found = {
            "recipe": describe(config, world, contestants[0]),
            "device": hardware_name(device),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "gemm_gflops": {_short(dtype): rate / 1e9 for dtype, rate in rates.items()},
            "steps": [figures(one, rates) for one in contestants],
        }
        return json.dumps(found) if as_json else table(found)


def as_plain_mae(config: RunConfig) -> RunConfig:
    """The same student and batch under plain MAE, with the objective's own mask and decoder where it has them, else MAE's."""
    optim = config.optim.model_copy(update={"layer_decay": 1.0})  # it tells no layers apart
    return config.model_copy(
        update={"objective": plain_mae(config.objective), "teacher": None, "optim": optim}
    )


def contestant(name: str, config: RunConfig, world: World, device: torch.device, *, data: bool) -> Contestant:
    """Build one step, take it twice, and read off its memory."""
    watch = PeakMemory(device)
    step = TrainingStep(config, world=world, device=device, data=data)
    first = sum(step.take().values())  # allocates Adam's moments, and compiles
    step.take()
    peak = watch.peak() if watch.can_measure else None
    work = step_work(config, measure_geometry(config, step.micro_batch), step.accumulation)
    return Contestant(name, step, work, config.optim.global_batch, first, peak)


def take_turns(
    contestants: list[Contestant], gemms: dict[torch.dtype, object], *, rounds: int, device: torch.device
) -> dict[torch.dtype, float]:
    """Measure everybody in every round; returns the rate of matrix products by dtype, in FLOP/s."""
    found: dict[torch.dtype, list[float]] = {dtype: [] for dtype in gemms}
    for _ in range(rounds):
        for dtype, rate in gemms.items():
            found[dtype].append(rate())
        for one in contestants:
            collectives.barrier()
            one.rounds.append(one.step.take())
    for one in contestants:
        collectives.barrier()
        with logged_collectives() as exchanged:
            one.step.take()
        one.exchange = exchanged()
    return {dtype: statistics.median(rates) for dtype, rates in found.items()}


def figures(one: Contestant, rates: dict[torch.dtype, float]) -> dict:
    """A contestant's plain numbers: seconds (the median, and of each round), GFLOP, share of the peak by part and for the step."""
    each = [sum(found.values()) for found in one.rounds]
    seconds = statistics.median(each)
    parts = {}
    for part in (part for part in PARTS if part in one.rounds[0]):
        spent = statistics.median(found[part] for found in one.rounds)
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
        "round_seconds": each,
        "first_seconds": one.first,
        "exchange_seconds": one.exchange,
        "images_per_s": one.images / seconds,
        "gflop": speed.flops / 1e9,
        "floor_seconds": speed.floor_s,
        "of_peak": speed.at(seconds)["of_peak"],
        "peak_gib": None if one.peak is None else one.peak / GIB,
        "parts": parts,
    }


def table(found: dict) -> str:
    """For a person: a table a contestant, then the ratios."""
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in found["gemm_gflops"].items())
    lines = [
        f"{found['recipe']}; {found['device']}, {found['threads']} threads; median of {found['rounds']} rounds",
        f"matrix products here: {rates} GFLOP/s",
    ]
    for step in found["steps"]:
        rows = [(step["name"], "seconds", "share", "GFLOP", "dtype", "of peak")]
        for part, row in step["parts"].items():
            counted = (
                (f"{row['gflop']:.1f}", row["dtype"], f"{row['of_peak']:.0%}")
                if "gflop" in row
                else ("", "", "")
            )
            rows.append((part, f"{row['seconds']:.3f}", f"{row['seconds'] / step['seconds']:.1%}", *counted))
        rows.append(
            ("step", f"{step['seconds']:.3f}", "100.0%", f"{step['gflop']:.1f}", "", f"{step['of_peak']:.0%}")
        )
        lines += ["", *text_table(rows)]
        memory = "" if step["peak_gib"] is None else f", peak memory {step['peak_gib']:.2f} GiB a rank"
        exchange = (
            f"; exchange {step['exchange_seconds']:.3f} s, within these parts"
            if step["exchange_seconds"]
            else ""
        )
        lines.append(
            f"{step['images_per_s']:.2f} images/s{memory}; floor {step['floor_seconds']:.3f} s; first step {step['first_seconds']:.1f} s{exchange}"
        )
    *others, last = found["steps"]
    lines += [""] if others else []
    for one in others:
        seconds = [mine / its for mine, its in zip(one["round_seconds"], last["round_seconds"])]
        lines.append(
            f"{one['name']} / {last['name']}: {statistics.median(seconds):.3f} of the time ({min(seconds):.3f} to {max(seconds):.3f} in a round), "
            f"{one['gflop'] / last['gflop']:.3f} of the work"
        )
    return "\n".join(lines)


def describe(config: RunConfig, world: World, one: Contestant) -> str:
    """What was measured, in one line."""
    teacher = (
        "no teacher"
        if config.teacher is None
        else f"{config.teacher.name} ({one.step.teacher}, {config.teacher.dtype})"
    )
    kernels = "".join(f"; {text}" for text in (one.step.kernels,) if text)
    return (
        f"{teacher} -> {config.student.name}, {one.step.objective.describe()}; {one.images} images a step on {world.size} ranks; "
        f"{config.precision}, {config.deepspeed}{kernels}"
    )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
