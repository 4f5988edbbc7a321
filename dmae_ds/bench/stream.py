"""What a teacher in stages costs beside a replicated one, and beside DeepSpeed's own pipeline, in one run.

    deepspeed --num_gpus 4 --module dmae_ds bench stream RECIPE [key=value] [--stages 2 4] [--sleep-ms 20]

The recipe gives the teacher's geometry, the tapped blocks, the student's patches and the micro-batch; weights and pixels
are random. Contestants take turns, round after round, in steady state (the stream is full before it is timed); a row is
the median of its rounds. Blocks that sleep show the schedule apart from the cores, of which ranks on one machine share
too few. Seconds belong to one machine; the ratios are what to look at.
"""

from __future__ import annotations

import itertools
import statistics
import time
import zlib
from dataclasses import dataclass
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmae_ds.bench.pipeline_engine import EvalBatch
from dmae_ds.config.batch import split_recipe
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.output.table import text_table
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.pipeline import StreamedTeacher, join_group
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.teacher.top import Top, meta_top

MIB = 1 << 20


@dataclass(frozen=True)
class Contestant:
    """One way to have the features of this rank's micro-batches. `ahead`: batches that wait on a rank meanwhile."""

    name: str
    num_stages: int
    teacher: FrozenTeacher
    advance: Callable[[int], None]  # so many micro-batches of every rank
    ahead: int
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
    """Measure every contestant and return the table, to print on rank 0. Collective; the process group is made here.

    clocks: micro-batches a rank and round, rounded up to twice the longest pipeline
    stages: pipeline lengths (default: all that the ranks and the blocks allow); sleep_ms: blocks sleep instead of computing
    Raises UserError for a recipe without a teacher, lengths that the ranks or the blocks don't allow, and one rank.
    """
    if config.teacher is None:
        raise UserError("bench stream needs a recipe with a teacher, such as dmae_vit_large_to_base")
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        objective, shape = build_objective(config, device="meta")
        depth, _ = needed_depths(objective.taps, shape.depth)
        stages = collectives.raise_on_all_ranks(lambda: _check_stages(stages, world=world.size, depth=depth))
        ticks = (
            -(-ticks // (2 * max(stages))) * 2 * max(stages)
        )  # whole calls of whoever takes several batches at once
        micro_batch, _ = collectives.raise_on_all_ranks(lambda: split_recipe(config, world.size))
        batches = list(
            random_batches(objective, config, micro_batch=micro_batch, rank=world.rank, device=device)
        )

        def build(held: range | None) -> MaskedViT:
            return random_teacher(config, depth, held, device=device, sleep_ms=sleep_ms)

        common = {
            "sees": config.teacher.sees,
            "view": resized_view(config, device),
            "top": random_top(config, objective, device=device),
        }
        contestants = list(_contestants(build, objective.taps, depth, stages, batches, common))
        seconds, waited = measure(contestants, ticks=ticks, rounds=rounds)
        plural = "sleep" if sleep_ms else "are real"
        patches = objective.num_visible if config.teacher.sees == "visible" else objective.student.num_patches
        about = (
            f"{config.teacher.name}: {depth} of {shape.depth} blocks, taps {', '.join(objective.taps)}, {config.teacher.dtype}; {world.size} ranks x {micro_batch} images, "
            f"{patches} patches; blocks {plural}{f' {sleep_ms:g} ms' if sleep_ms else ''}; "
            f"{device.type}; median of {rounds} rounds of {ticks} micro-batches a rank"
        )
        return about + "\n\n" + table(contestants, seconds, waited, images=world.size * micro_batch * ticks)


def measure(
    contestants: list[Contestant], *, ticks: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """({name: median seconds of a round}, {name: share of all rounds spent waiting for an exchange, mean over ranks})."""
    bar = tqdm(total=rounds * len(contestants), unit="turn", disable=not collectives.is_main())
    for contestant in contestants:
        contestant.advance(max(1, contestant.ahead))  # fills a stream, and lets everybody allocate
    spent: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    waited = dict.fromkeys(spent, 0.0)
    for _ in range(rounds):
        for contestant in contestants:
            bar.set_postfix_str(contestant.name)
            before = contestant.waited_s
            collectives.barrier()
            since = time.perf_counter()
            contestant.advance(ticks)
            settle()
            collectives.barrier()
            spent[contestant.name].append(time.perf_counter() - since)
            waited[contestant.name] += contestant.waited_s - before
            bar.update()
    bar.close()
    shares = {name: waited[name] / sum(times) for name, times in spent.items()}
    means = collectives.mean_over_ranks(torch.tensor(list(shares.values()))).tolist()
    return {name: statistics.median(times) for name, times in spent.items()}, dict(zip(shares, means))


def table(
    contestants: list[Contestant], seconds: dict[str, float], waited: dict[str, float], *, images: int
) -> str:
    """One row a contestant. `of replicated` and `of eval_batch`: ratios of images/s within this run."""
    rows = [
        (
            "teacher",
            "P",
            "weights a rank MiB",
            "ahead",
            "images/s",
            "of replicated",
            "of eval_batch",
            "waiting",
            "bubble by schedule",
        )
    ]
    replicated = seconds[contestants[0].name]
    for one in contestants:
        own = seconds[one.name]
        rival = next(
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
                f"{images / own:.1f}",
                f"{replicated / own:.3f}",
                f"{rival / own:.2f}" if rival and one.num_stages > 1 else "",
                f"{waited[one.name]:.1%}" if isinstance(one.teacher, StreamedTeacher) else "",
                f"{one.bubble:.0%}",
            )
        )
    return "\n".join(text_table(rows))


def random_teacher(
    config: RunConfig, depth: int, held: range | None, *, device: torch.device, sleep_ms: float | None
) -> MaskedViT:
    """The cut teacher with random weights that depend on their names alone; of a stage, only the blocks `held`."""
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), depth)
    for number in range(depth):
        if sleep_ms is not None:
            vit.blocks[number] = _Sleeping(vit.blocks[number], sleep_ms / 1000)
    unneeded = (
        [] if held is None else [block for number, block in enumerate(vit.blocks) if number not in held]
    )
    fill_randomly(
        vit,
        [module for block in unneeded for module in block.modules()],
        dtype=DTYPES[config.teacher.dtype],
        device=device,
    )
    return vit.to(device).eval() if held is None else vit.eval()


def random_top(config: RunConfig, objective: Objective, *, device: torch.device) -> Top | None:
    """What stands on the teacher's encoder, likewise; its shape is the recipe's."""
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), keep_norm=True)
    _, decoder_depth = needed_depths(objective.taps, vit.depth, config.teacher.decoder_depth)
    top = meta_top(
        config.teacher,
        vit,
        vit.norm,
        taps=objective.taps,
        decoder_depth=decoder_depth,
        num_classes=objective.num_classes,
    )
    if top is not None:
        fill_randomly(top, [], dtype=DTYPES[config.teacher.dtype], device=device)
        top.eval()
    return top


def fill_randomly(
    network: nn.Module, unneeded: list[nn.Module], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Give every meta tensor outside the modules `unneeded` random entries that depend on its name alone."""
    for name, module in network.named_modules():
        if not any(module is other for other in unneeded):
            for kind in (module._parameters, module._buffers):
                for key, tensor in kind.items():
                    if tensor is not None and tensor.is_meta:
                        kind[key] = _random(f"{name}.{key}", tensor, dtype=dtype, device=device)


def resized_view(config: RunConfig, device: torch.device) -> PatchView:
    """The student's patches at the teacher's size, in the data's own statistics."""
    teacher = meta_teacher(config.teacher.name, config.teacher.overrides(), 1)
    statistics = {"mean": config.data.mean, "std": config.data.std}
    return PatchView(
        teacher.patch_size, **statistics, teacher_mean=config.data.mean, teacher_std=config.data.std
    ).to(device)


def _check_stages(stages: list[int] | None, *, world: int, depth: int) -> list[int]:
    possible = [number for number in range(2, min(world, depth) + 1) if world % number == 0]
    if not possible:
        raise UserError(
            f"bench stream needs ranks to put stages on; found {world}: start it with `deepspeed --num_gpus 4 --module dmae_ds bench stream RECIPE`"
        )
    for number in stages or ():
        if number not in possible:
            raise UserError(
                f"--stages {number} is not possible with {world} ranks and {depth} blocks; choose from {', '.join(map(str, possible))}"
            )
    return stages or possible


def random_batches(
    objective: Objective, config: RunConfig, *, micro_batch: int, rank: int, device: torch.device
) -> Iterator[PatchBatch]:
    """Four prepared batches of random pixels; a contestant goes round them."""
    normalize = Normalize(config.data.mean, config.data.std).to(device)
    for index in range(4):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        yield objective.prepare(random_batch(objective, micro_batch, generator).to(device), normalize)


def random_batch(objective: Objective, micro_batch: int, generator: torch.Generator) -> Batch:
    """A batch of random pixels in the views that an objective asks for; labels are all 0."""
    own = objective.student.grid[0] * objective.student.patch_size
    views = [
        torch.randint(
            256, (micro_batch, 3, view.size or own, view.size or own), dtype=torch.uint8, generator=generator
        )
        for view in objective.views
    ]
    noise = torch.rand(micro_batch, objective.student.num_patches, generator=generator)
    zeros = torch.zeros(micro_batch, dtype=torch.int64)
    return Batch(
        views[0],
        noise,
        labels=zeros,
        sample_ids=torch.arange(micro_batch),
        epochs=zeros,
        more_views=tuple(views[1:]),
    )


def _contestants(
    build: Callable,
    taps: tuple[str, ...],
    depth: int,
    stages: list[int],
    batches: list[PatchBatch],
    common: dict,
) -> Iterator[Contestant]:
    replicated = FrozenTeacher(build(None), taps, None, **common)
    turns = itertools.cycle(batches)
    yield Contestant(
        "replicated",
        1,
        replicated,
        lambda count: [replicated.features(next(turns)) for _ in range(count)],
        0,
        0.0,
    )
    for num_stages in stages:
        group = join_group(num_stages)
        held = held_blocks(depth, num_stages)[group.stage]
        for name, overlap in (("stream", True), ("stream without overlap", False)):
            streamed = StreamedTeacher(build(held), taps, None, **common, group=group, overlap=overlap)
            running = streamed.stream((None, batch) for batch in itertools.cycle(batches))
            ahead = num_stages * (2 if overlap else 1)
            yield Contestant(
                f"{name}, P {num_stages}",
                num_stages,
                streamed,
                lambda count, running=running: [next(running) for _ in range(count)],
                ahead,
                0.0,
            )
        if replicated.vit.rope is None and len(taps) == 1 and taps[0] == f"block/{depth}":
            # As DeepSpeed's schedule has it: one micro-batch of every rank; then as far ahead as the stream looks.
            vit = build(None)
            engine = EvalBatch(vit, group)
            rival = FrozenTeacher(vit, taps, None)
            _check_equal(engine, replicated, batches[0])
            for name, ahead in (("eval_batch", 1), ("eval_batch looking ahead", 2 * num_stages)):
                advance = _in_calls_of(
                    ahead,
                    lambda count, engine=engine: engine.features(
                        [_embed(replicated, next(turns)) for _ in range(count)]
                    ),
                )
                micro_batches = ahead * num_stages
                yield Contestant(
                    f"{name}, P {num_stages}",
                    num_stages,
                    rival,
                    advance,
                    ahead,
                    (num_stages - 1) / (micro_batches + num_stages - 1),
                )


def _check_equal(engine: EvalBatch, replicated: FrozenTeacher, batch: PatchBatch) -> None:
    """The rival does the same work."""
    (found,), (expected,) = engine.features([_embed(replicated, batch)]), replicated.features(batch).values()
    assert torch.equal(found, expected)


def _in_calls_of(size: int, call: Callable[[int], object]) -> Callable[[int], None]:
    """Advance by any multiple of `size`, in calls of `size`."""

    def advance(count: int) -> None:
        assert count % size == 0
        for _ in range(count // size):
            call(size)

    return advance


@torch.no_grad()
def _embed(teacher: FrozenTeacher, batch: PatchBatch) -> Tensor:
    patches, ids = teacher.inputs(batch)
    return teacher.vit.embed(teacher.view(patches), ids)


class _Sleeping(nn.Module):
    """A block that takes its time and nothing else; it keeps its weights, to be counted."""

    def __init__(self, block: nn.Module, seconds: float):
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, tokens: Tensor, **keys) -> Tensor:
        time.sleep(self.seconds)
        return tokens + 1


def _random(name: str, like: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fixed draw for each name: norms near one, everything else N(0, .02^2)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    draw = 0.02 * torch.randn(like.shape, generator=generator)
    tensor = (draw + 1 if "norm" in name and name.endswith("weight") else draw).to(dtype=dtype, device=device)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor


def settle() -> None:
    """Wait for the device: launched is not done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
