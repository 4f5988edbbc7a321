"""Throughput of a teacher in pipeline stages, next to a replicated one and to DeepSpeed's own pipeline.

    deepspeed --num_gpus 4 --module dmae_ds bench stream RECIPE [key=value] [--stages 2 4] [--sleep-ms 20]

The recipe gives the teacher's geometry, the tapped blocks, the student's patches and the micro-batch; weights
and pixels are random. Contestants take turns, round after round, in steady state (the stream is full before
it is timed); a row is the median of its rounds. Blocks that sleep show the schedule apart from the cores, of
which ranks on one machine share too few. Seconds belong to one machine; the ratios are what to look at.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.bench.pipeline_engine import EvalBatch
from dmae_ds.bench.random_batch import random_batches
from dmae_ds.bench.random_teacher import (
    check_one_teacher,
    random_teacher,
    random_teacher_view,
    random_top,
)
from dmae_ds.config.family import check_one_student
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.build import build_objective
from dmae_ds.output.progress import LINE_EVERY_S, Progress
from dmae_ds.output.table import text_table
from dmae_ds.output.units import MIB
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.frozen import FrozenTeacher, needed_depths
from dmae_ds.teacher.pipeline import StreamedTeacher, join_group
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.train.cut import CutRecipe
from dmae_ds.train.forecast import resolve_micro_batch
from dmae_ds.train.speed import wait_for


@dataclass(frozen=True)
class Contestant:
    """One way to compute the features of this rank's micro-batches."""

    name: str
    num_stages: int
    teacher: FrozenTeacher
    advance: Callable[[int], object]  # computes so many micro-batches of every rank
    ahead: int  # batches that wait on a rank meanwhile
    bubble: float  # idle share of a stage's time, by the schedule

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.teacher.vit.state_dict().values() if not tensor.is_meta)

    @property
    def waited_s(self) -> float:
        return getattr(self.teacher, "waited_s", 0.0)


def bench_stream(
    config: RunConfig,
    world: World,
    *,
    stages: list[int] | None,
    sleep_ms: float | None,
    ticks: int,
    rounds: int,
) -> str:
    """Measure every contestant and return the table, to print on rank 0. Collective; makes the process group.

    ticks: micro-batches a rank and round, rounded up to twice the longest pipeline
    stages: pipeline lengths; None: all that the ranks and the blocks allow
    sleep_ms: blocks sleep so long instead of computing
    Raises UserError for a recipe without a teacher, lengths that the ranks or the blocks don't allow, and one
    rank.
    """
    check_one_teacher(config, "stream")
    check_one_student(config, "bench stream")
    if config.teacher is None:
        raise UserError("bench stream needs a recipe with a teacher, such as dmae_vit_large_to_base")
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        objective, shapes = build_objective(config, device="meta")
        shape = shapes[""]
        depth, _ = needed_depths(objective.taps, shape.depth)
        stages = collectives.raise_on_all_ranks(lambda: _check_stages(stages, world=world.size, depth=depth))
        # Whole calls of those contestants that take several batches at once.
        call = 2 * max(stages)
        ticks = -(-ticks // call) * call
        cut = collectives.raise_on_all_ranks(lambda: CutRecipe.of(config, world))
        micro_batch = resolve_micro_batch(cut, device)[0].micro_batch
        batches = random_batches(objective, config, micro_batch=micro_batch, rank=world.rank, device=device)

        def build(held: range | None) -> MaskedViT:
            return random_teacher(config, depth, held, device=device, sleep_ms=sleep_ms)

        common = {
            "sees": seen_patches(config.teacher, objective.student.num_patches),
            "view": random_teacher_view(config, device),
            "top": random_top(config, objective, device=device),
        }
        contestants = list(_contestants(build, objective.taps, depth, stages, batches, common))
        seconds, waited = measure(contestants, ticks=ticks, rounds=rounds, device=device)
        student = objective.student
        seen = {"visible": objective.num_visible, "all": student.num_patches}
        patches = seen.get(common["sees"], common["sees"])
        blocks = f"blocks sleep {sleep_ms:g} ms" if sleep_ms else "blocks are real"
        title = (
            f"{config.teacher.name}: {depth} of {shape.depth} blocks, taps {', '.join(objective.taps)}, "
            f"{config.teacher.dtype}; {world.size} ranks x {micro_batch} images, {patches} patches; "
            f"{blocks}; "
            f"{device.type}; median of {rounds} rounds of {ticks} micro-batches a rank"
        )
        return title + "\n\n" + table(contestants, seconds, waited, images=world.size * micro_batch * ticks)


def measure(
    contestants: list[Contestant], *, ticks: int, rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Time all contestants in turns.

    Returns ({name: median seconds of a round}, {name: share of all rounds spent waiting for an exchange, mean
    over ranks}).
    """
    progress = Progress(
        total=rounds * len(contestants), unit="turn", every_s=LINE_EVERY_S, is_shown=collectives.is_main()
    )
    for contestant in contestants:
        contestant.advance(max(1, contestant.ahead))  # fills a stream, and lets every one allocate
    spent: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    waited = dict.fromkeys(spent, 0.0)
    for _ in range(rounds):
        for contestant in contestants:
            before = contestant.waited_s
            collectives.barrier()
            since = time.perf_counter()
            contestant.advance(ticks)
            wait_for(device)
            collectives.barrier()
            spent[contestant.name].append(time.perf_counter() - since)
            waited[contestant.name] += contestant.waited_s - before
            progress.advance()
    progress.close()
    shares = {name: waited[name] / sum(times) for name, times in spent.items()}
    shares_of_ranks = collectives.gather_objects(shares)
    means = {name: statistics.fmean(of_rank[name] for of_rank in shares_of_ranks) for name in shares}
    return {name: statistics.median(times) for name, times in spent.items()}, means


def table(
    contestants: list[Contestant], seconds: dict[str, float], waited: dict[str, float], *, images: int
) -> str:
    """One row a contestant; `of replicated` and `of eval_batch` are ratios of images/s within this run."""
    heads = ("teacher", "P", "weights a rank MiB", "ahead", "images/s")
    rows = [(*heads, "of replicated", "of eval_batch", "waiting", "bubble by schedule")]
    replicated_s = seconds[contestants[0].name]
    for one in contestants:
        one_s = seconds[one.name]
        is_streamed = isinstance(one.teacher, StreamedTeacher)
        eval_batch_s = next(
            (
                seconds[other.name]
                for other in contestants
                if other.num_stages == one.num_stages and other.name.startswith("eval_batch")
            ),
            None,
        )
        rows.append(
            (
                one.name.split(",")[0],
                f"{one.num_stages}",
                f"{one.num_bytes / MIB:.1f}",
                f"{one.ahead}",
                f"{images / one_s:.1f}",
                f"{replicated_s / one_s:.3f}",
                f"{eval_batch_s / one_s:.2f}" if eval_batch_s and one.num_stages > 1 else "",
                f"{waited[one.name]:.1%}" if is_streamed else "",
                f"{one.bubble:.0%}",
            )
        )
    return "\n".join(text_table(rows))


def _check_stages(stages: list[int] | None, *, world: int, depth: int) -> list[int]:
    possible = [number for number in range(2, min(world, depth) + 1) if world % number == 0]
    if not possible:
        raise UserError(
            f"bench stream needs at least two ranks to put stages on, found {world}; start it with "
            "`deepspeed --num_gpus 4 --module dmae_ds bench stream RECIPE`"
        )
    for number in stages or ():
        if number not in possible:
            raise UserError(
                f"--stages {number} is not possible with {world} ranks and {depth} blocks; "
                f"choose from {', '.join(map(str, possible))}"
            )
    return stages or possible


def _contestants(
    build: Callable[[range | None], MaskedViT],
    taps: tuple[str, ...],
    depth: int,
    stages: list[int],
    batches: list[PatchBatch],
    common: dict,
) -> Iterator[Contestant]:
    """Yield the replicated teacher, then two streams for each length, and eval_batch where it can run."""
    replicated = FrozenTeacher(build(None), taps, None, **common)
    turns = itertools.cycle(batches)

    def run_replicated(count: int) -> None:
        for _ in range(count):
            replicated.features(next(turns))

    yield Contestant("replicated", 1, replicated, run_replicated, 0, 0.0)
    # DeepSpeed's pipeline hands on plain tokens: no rotary positions, and one tap, after the last block.
    comparable = replicated.vit.rope is None and taps == (f"block/{depth}",)
    for num_stages in stages:
        group = join_group(num_stages)
        held = held_blocks(depth, num_stages)[group.stage]
        for name, overlap in (("stream", True), ("stream without overlap", False)):
            streamed = StreamedTeacher(build(held), taps, None, **common, group=group, overlap=overlap)
            running = streamed.stream((None, batch) for batch in itertools.cycle(batches))
            ahead = num_stages * (2 if overlap else 1)
            advance = _take_from(running)
            yield Contestant(f"{name}, P {num_stages}", num_stages, streamed, advance, ahead, 0.0)
        if comparable:
            vit = build(None)
            engine = EvalBatch(vit, group)
            rival = FrozenTeacher(vit, taps, None)
            _check_equal(engine, replicated, batches[0])
            # One micro-batch of every rank, as in DeepSpeed's schedule; then as many ahead as the stream.
            for name, ahead in (("eval_batch", 1), ("eval_batch looking ahead", 2 * num_stages)):
                advance = _in_calls_of(ahead, engine, replicated, turns)
                bubble = (num_stages - 1) / (ahead * num_stages + num_stages - 1)
                yield Contestant(f"{name}, P {num_stages}", num_stages, rival, advance, ahead, bubble)


def _take_from(running: Iterator) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            next(running)

    return advance


def _in_calls_of(
    size: int, engine: EvalBatch, replicated: FrozenTeacher, turns: Iterator[PatchBatch]
) -> Callable[[int], None]:
    """Advance by a multiple of `size` batches, in calls of `size`."""

    def advance(count: int) -> None:
        assert count % size == 0
        for _ in range(count // size):
            engine.features([_embed(replicated, next(turns)) for _ in range(size)])

    return advance


def _check_equal(engine: EvalBatch, replicated: FrozenTeacher, batch: PatchBatch) -> None:
    """Both compute the same features."""
    (features,) = engine.features([_embed(replicated, batch)])
    (expected,) = replicated.features(batch).values()
    assert torch.equal(features, expected)


@torch.no_grad()
def _embed(teacher: FrozenTeacher, batch: PatchBatch) -> Tensor:
    patches, ids = teacher.inputs(batch)
    return teacher.vit.embed(teacher.view(patches), ids)
