"""Where a training step's time goes, and how near it is to the fastest matrix product of this device.

    dmae-ds bench step RECIPE [key=value] [--against mae] [--rounds 7] [--json]

The step is training's own: the recipe's objective in its DeepSpeed engine, the cut teacher, the mask drawn on the device;
weights and pixels are random, so no file is needed, and nothing waits for data (training's metrics book that wait as
seconds/data). Contestants and the matrix products take turns, round after round; a figure is the median of its rounds.
Work is counted by torch's own FLOP counter on fake tensors (plan/trace.py). Seconds belong to one machine; shares and
ratios are what to look at.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from dataclasses import dataclass, field

import torch

from dmae_ds import dist
from dmae_ds.bench.stream import random_teacher
from dmae_ds.config.deepspeed import load_deepspeed
from dmae_ds.config.objectives import MaeConfig, MaskedPixels
from dmae_ds.config.run import RunConfig
from dmae_ds.deepspeed_import import import_deepspeed
from dmae_ds.errors import UserError
from dmae_ds.models.compiled import compile_blocks
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.build import build_objective
from dmae_ds.plan.choose import GIB
from dmae_ds.plan.geometry import measure as measure_geometry
from dmae_ds.plan.work import Work, step_work
from dmae_ds.teacher.frozen import FrozenTeacher, NoTeacher, needed_depths
from dmae_ds.teacher.grid import PatchView
from dmae_ds.train.engine import Engine, check_precision
from dmae_ds.train.memory import MemoryWatch
from dmae_ds.train.optim import build_optimizer
from dmae_ds.train.preflight import split_batch
from dmae_ds.train.speed import Speed, gemm_rate, wait_for

PARTS = ("prepare", "teacher", "forward", "backward", "optimizer")


@dataclass
class Contestant:
    """One recipe's step. `work`: {part: (FLOP of a step on this rank, dtype of its products)}; peak: bytes, nothing else being built."""

    name: str
    step: _Step
    work: Work
    images: int
    peak: int | None
    rounds: list[dict[str, float]] = field(default_factory=list)


def bench_step(config: RunConfig, world: dist.World, *, against: str | None, rounds: int, as_json: bool) -> str:
    """Measure and return the table, or JSON, to print on rank 0. Collective; the process group is made here.

    against: `mae`, to measure the same step without a teacher beside it
    Raises UserError for a recipe that can't be built, and for --against mae of a recipe without a teacher.
    """
    if against is not None and config.teacher is None:
        raise UserError(f"--against {against} compares distilling with the same step without a teacher, and this recipe has none; take one with a teacher")
    with dist.joined(world, timeout_s=config.dist.timeout_s) as device:
        import_deepspeed(device)  # before memory is counted
        recipes = {config.objective.name: config} | ({against: without_teacher(config)} if against else {})
        contestants = [contestant(name, recipe, world, device) for name, recipe in recipes.items()]
        dtypes = {dtype for one in contestants for _, dtype in one.work.values()}
        rates = take_turns(contestants, {dtype: gemm_rate(dtype, device) for dtype in dtypes}, rounds=rounds, device=device)
        found = {
            "recipe": describe(config, world, contestants[0]), "device": device_name(device), "threads": torch.get_num_threads(), "rounds": rounds,
            "gemm_gflops": {_short(dtype): rate / 1e9 for dtype, rate in rates.items()}, "steps": [figures(one, rates) for one in contestants],
        }  # fmt: skip
        return json.dumps(found) if as_json else table(found)


def without_teacher(config: RunConfig) -> RunConfig:
    """The same student, mask, decoder and batch under plain MAE."""
    shared = {name: getattr(config.objective, name) for name in MaskedPixels.model_fields}
    return config.model_copy(update={"objective": MaeConfig(name="mae", **shared), "teacher": None})


def contestant(name: str, config: RunConfig, world: dist.World, device: torch.device) -> Contestant:
    """Build one step, take it twice, and read off its memory."""
    watch = MemoryWatch(device)
    micro_batch, accumulation = split_batch(config.optim.global_batch, config.optim.micro_batch, world.size, views=config.data.repeat)
    step = _Step(config, micro_batch=micro_batch, accumulation=accumulation, world=world, device=device)
    for _ in range(2):  # the first one allocates Adam's moments
        step.take()
    peak = watch.peak() if watch.can_measure else None
    work = step_work(config, measure_geometry(config, micro_batch), accumulation)
    return Contestant(name, step, work, micro_batch * accumulation * world.size, peak)


def take_turns(contestants: list[Contestant], gemms: dict[torch.dtype, object], *, rounds: int, device: torch.device) -> dict[torch.dtype, float]:
    """Measure everybody in every round; returns the rate of matrix products by dtype, in FLOP/s."""
    found: dict[torch.dtype, list[float]] = {dtype: [] for dtype in gemms}
    for _ in range(rounds):
        for dtype, rate in gemms.items():
            found[dtype].append(rate())
        for one in contestants:
            dist.barrier()
            one.rounds.append(one.step.take())
    return {dtype: statistics.median(rates) for dtype, rates in found.items()}


def figures(one: Contestant, rates: dict[torch.dtype, float]) -> dict:
    """A contestant's plain numbers: seconds, GFLOP, share of the peak by part and for the step."""
    seconds = statistics.median(sum(found.values()) for found in one.rounds)
    parts = {}
    for part in (part for part in PARTS if part in one.rounds[0]):
        spent = statistics.median(found[part] for found in one.rounds)
        parts[part] = {"seconds": spent}
        if part in one.work:
            flops, dtype = one.work[part]
            parts[part] |= {"gflop": flops / 1e9, "dtype": _short(dtype), "of_peak": flops / rates[dtype] / spent}
    speed = Speed(one.work, rates)
    return {
        "name": one.name, "seconds": seconds, "images_per_s": one.images / seconds, "gflop": speed.flops / 1e9,
        "floor_seconds": speed.floor_s, "of_peak": speed.at(seconds)["of_peak"], "peak_gib": None if one.peak is None else one.peak / GIB, "parts": parts,
    }  # fmt: skip


def table(found: dict) -> str:
    """For a person: a table a contestant, then the ratios."""
    rates = ", ".join(f"{dtype} {rate:,.0f}" for dtype, rate in found["gemm_gflops"].items())
    lines = [f"{found['recipe']}; {found['device']}, {found['threads']} threads; median of {found['rounds']} rounds", f"matrix products here: {rates} GFLOP/s"]
    for step in found["steps"]:
        rows = [(step["name"], "seconds", "share", "GFLOP", "dtype", "of peak")]
        for part, row in step["parts"].items():
            counted = (f"{row['gflop']:.1f}", row["dtype"], f"{row['of_peak']:.0%}") if "gflop" in row else ("", "", "")
            rows.append((part, f"{row['seconds']:.3f}", f"{row['seconds'] / step['seconds']:.1%}", *counted))
        rows.append(("step", f"{step['seconds']:.3f}", "100.0%", f"{step['gflop']:.1f}", "", f"{step['of_peak']:.0%}"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["", *("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip() for row in rows)]
        memory = "" if step["peak_gib"] is None else f", peak memory {step['peak_gib']:.2f} GiB a rank"
        lines.append(f"{step['images_per_s']:.2f} images/s{memory}; floor {step['floor_seconds']:.3f} s")
    if len(found["steps"]) > 1:
        own, other = found["steps"]
        lines += ["", f"{own['name']} / {other['name']}: {own['seconds'] / other['seconds']:.3f} of the time, {own['gflop'] / other['gflop']:.3f} of the work"]
    return "\n".join(lines)


def describe(config: RunConfig, world: dist.World, one: Contestant) -> str:
    """What was measured, in one line."""
    teacher = "no teacher" if config.teacher is None else f"{config.teacher.name} ({one.step.teacher}, {config.teacher.dtype})"
    return (
        f"{teacher} -> {config.student.name}, {one.step.objective.describe()}; {one.images} images a step on {world.size} ranks; "
        f"{config.precision}, {config.deepspeed}"
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or that of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "cpu"


class _Step:
    """One optimiser step of a recipe on random pixels, as training takes it."""

    def __init__(self, config: RunConfig, *, micro_batch: int, accumulation: int, world: dist.World, device: torch.device):
        check_precision(config.precision, device)
        self.device, self.accumulation = device, accumulation
        self.objective, shape = build_objective(config)
        self.teacher = NoTeacher()
        if config.teacher is not None:
            depth, decoder_depth = needed_depths(self.objective.taps, shape.depth)
            if decoder_depth:
                raise UserError("the objective taps the teacher's decoder, whose shape only its file knows; bench step takes taps of the encoder")
            vit = random_teacher(config, depth, None, device=device, sleep_ms=None)
            statistics_ = {"mean": config.data.mean, "std": config.data.std}
            view = PatchView(vit.patch_size, **statistics_, teacher_mean=config.data.mean, teacher_std=config.data.std)
            self.teacher = _Cut(vit, self.objective.taps, None, view=view, sees=config.teacher.sees)
        if config.compile:
            for network in (self.objective, *([] if config.teacher is None else [vit])):
                compile_blocks(network)
        deepspeed = load_deepspeed(
            config.deepspeed, micro_batch=micro_batch, accumulation=accumulation, world_size=world.size, clip_grad=config.optim.clip_grad,
            precision=config.precision,
        )  # fmt: skip
        student = self.objective.student
        size = [edge * student.patch_size for edge in student.grid]
        self.num_parameters = sum(parameter.numel() for parameter in self.objective.parameters())
        self.engine = Engine(self.objective, build_optimizer(self.objective, config.optim), deepspeed, device)
        self.engine.set_lr(0.0)
        self.normalize = Normalize(config.data.mean, config.data.std).to(device)
        generator = torch.Generator().manual_seed(1000 + world.rank)
        batches = [
            (torch.randint(256, (micro_batch, 3, *size), dtype=torch.uint8, generator=generator), torch.rand(micro_batch, student.num_patches, generator=generator))
            for _ in range(4)
        ]  # fmt: skip
        self.batches = itertools.cycle([(images.to(device), noise.to(device)) for images, noise in batches])

    def take(self) -> dict[str, float]:
        """Do it; returns {part: seconds}."""
        laps = _Laps(self.device)
        for _ in range(self.accumulation):
            images, noise = next(self.batches)
            masked = self.objective.prepare(images, noise, self.normalize)
            laps("prepare")
            features = {}
            if self.objective.taps:
                features = self.teacher.features(masked)
                laps("teacher")
            self.engine.train_micro_batch(masked, features, lap=laps)
        return laps.seconds()


class _Cut(FrozenTeacher):
    """A teacher of random weights: there is no file to give an account of."""

    def __str__(self) -> str:
        return f"{self.vit.depth} blocks"


class _Laps:
    """Time between marks, added up by name; on a GPU by events, so that nothing is waited for before the end."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, object]] = []
        wait_for(device)
        self("start")

    def __call__(self, name: str) -> None:
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((name, mark))

    def seconds(self) -> dict[str, float]:
        wait_for(self.device)
        found: dict[str, float] = {}
        for (_, before), (name, after) in itertools.pairwise(self._marks):
            spent = after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
            found[name] = found.get(name, 0.0) + spent
        return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
