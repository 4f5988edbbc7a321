"""`dmae-ds bench step | stream | cache | save | ...`: arguments; torch is imported when a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.cli.arguments import add_recipe, at_least_one
from dmae_ds.cli.ranks import same_on_every_rank
from dmae_ds.errors import UserError
from dmae_ds.output.parser import in_list

if TYPE_CHECKING:
    from dmae_ds.distributed.world import World

# Options of `growth`: kind of the values, their name, what they are.
GROWTH = {
    "--widths": (int, "D", "values of student.embed_dim"),
    "--depths": (int, "N", "values of teacher.depth; the table says how many blocks run"),
    "--mask-ratios": (float, "R", "shares of the patches that are masked"),
    "--students": (at_least_one, "N", "numbers of copies of the student, which share the teacher's pass"),
}


def add_bench(subcommands) -> None:
    """Add `bench` and its subcommands to the root parser."""
    bench = subcommands.add_parser("bench", help="measure ratios of times and bytes on this machine")
    kinds = bench.add_subparsers(
        required=True, metavar="step | growth | teacher-load | stream | cache | save | knn | gpu"
    )
    _add_step(kinds)
    _add_growth(kinds)
    _add_teacher_load(kinds)
    _add_stream(kinds)
    _add_cache(kinds)
    _add_save(kinds)
    _add_knn(kinds)
    _add_gpu(kinds)


def _add_step(kinds) -> None:
    step = kinds.add_parser(
        "step", help="the parts of a training step, compared with the fastest matrix product of this device"
    )
    add_recipe(step)
    step.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="mae|KEY=VALUE",
        help="also measure, in turns, plain MAE of the same student, or the recipe with another value; "
        "may be repeated",
    )
    step.add_argument(
        "--data",
        action="store_true",
        help="read the recipe's data.train as training does (default: random pixels on the device)",
    )
    _add_rounds(step, 7)
    step.add_argument("--json", action="store_true", help="print JSON")
    step.set_defaults(command=_step)


def _add_growth(kinds) -> None:
    growth = kinds.add_parser(
        "growth", help="time and memory of a training step against sizes of its networks, and counted FLOPs"
    )
    add_recipe(growth, note="; its own values are always measured")
    for option, (kind, metavar, meaning) in GROWTH.items():
        growth.add_argument(
            option,
            type=in_list(kind),
            nargs="+",
            metavar=metavar,
            help=f"{meaning} (of these four, those that are given are measured; without any, all are)",
        )
    _add_rounds(growth, 7)
    growth.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the ratios into this file")
    growth.add_argument("--json", action="store_true", help="print JSON")
    growth.set_defaults(command=_growth)


def _add_teacher_load(kinds) -> None:
    load = kinds.add_parser(
        "teacher-load",
        help="bytes read and memory used to load a cut teacher, compared with the bytes needed",
    )
    load.add_argument(
        "--name",
        default="vit_huge_patch14_224",
        help="timm name of the whole teacher (default vit_huge_patch14_224)",
    )
    load.add_argument(
        "--last-block",
        type=int,
        metavar="K",
        help="the deepest tapped block (default: three quarters of the depth)",
    )
    load.add_argument(
        "--stages",
        type=in_list(int),
        nargs="+",
        default=[1, 2, 4],
        metavar="P",
        help="numbers of pipeline stages (default 1 2 4)",
    )
    load.add_argument(
        "--folder",
        type=Path,
        help="where the files of random weights are written and kept (default: a temporary folder)",
    )
    load.set_defaults(command=_teacher_load)


def _add_stream(kinds) -> None:
    stream = kinds.add_parser(
        "stream",
        help="a teacher in stages, a replicated one, and DeepSpeed's eval_batch; start it with a launcher",
    )
    add_recipe(stream, note="; it gives the teacher and the micro-batch")
    stream.add_argument(
        "--stages",
        type=in_list(int),
        nargs="+",
        metavar="P",
        help="numbers of pipeline stages (default: all that the ranks allow)",
    )
    stream.add_argument(
        "--sleep-ms",
        type=float,
        metavar="MS",
        help="replace each block's computation by a sleep, to measure the schedule alone",
    )
    stream.add_argument(
        "--clocks",
        type=at_least_one,
        default=16,
        metavar="N",
        help="pipeline ticks of one round: micro-batches of each rank (default 16)",
    )
    _add_rounds(stream, 7)
    stream.set_defaults(command=_stream)


def _add_cache(kinds) -> None:
    cache = kinds.add_parser(
        "cache", help="a step from stored features and from a live teacher; reading, and plain reads"
    )
    add_recipe(cache, note="; it gives the networks and the micro-batch")
    cache.add_argument(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16", "int8"),
        default=["fp32", "bf16", "int8"],
        help="dtypes of the stored features (default fp32 bf16 int8)",
    )
    cache.add_argument(
        "--folder", type=Path, help="where caches are written, and removed (default: a temporary folder)"
    )
    _add_rounds(cache, 5)
    cache.set_defaults(command=_cache)


def _add_save(kinds) -> None:
    save = kinds.add_parser(
        "save",
        help="bytes and seconds of a checkpoint, compared with a plain write of as many bytes",
    )
    add_recipe(save, note="; it gives the networks, the DeepSpeed file and the batch")
    save.add_argument(
        "--steps", type=at_least_one, default=3, metavar="N", help="optimiser steps of one round (default 3)"
    )
    _add_rounds(save, 5)
    save.add_argument(
        "--folder",
        type=Path,
        help="a folder on the disk to measure; nothing is left in it (default: the temporary folder)",
    )
    save.set_defaults(command=_save)


def _add_knn(kinds) -> None:
    knn = kinds.add_parser("knn", help="memory and time of eval knn at ImageNet's size, on random features")
    counts = {
        "train": (1_281_167, "training rows"),
        "queries": (2048, "rows to classify"),
        "dim": (768, "width of a feature"),
        "k": (20, "neighbours"),
        "classes": (1000, "classes"),
    }
    for name, (default, meaning) in counts.items():
        knn.add_argument(
            f"--{name}",
            type=at_least_one,
            default=default,
            metavar="N",
            help=f"{meaning} (default {default:,})",
        )
    knn.add_argument(
        "--memory-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="memory of the search, without the features (default 1)",
    )
    knn.set_defaults(command=_knn)


def _add_gpu(kinds) -> None:
    gpu = kinds.add_parser("gpu", help="the figures of launch/gpu_check.sh: steps at real size on one GPU")
    gpu.add_argument("out", type=Path, metavar="OUT", help="a folder; what it holds is not measured again")
    gpu.add_argument("--rehearse", action="store_true", help="small networks, also on a CPU")
    gpu.set_defaults(command=_gpu)


def _add_rounds(command: argparse.ArgumentParser, default: int) -> None:
    command.add_argument(
        "--rounds",
        type=at_least_one,
        default=default,
        metavar="N",
        help=f"number of rounds; their median is printed (default {default})",
    )


def _print_on_main(measure: Callable[[World], str]) -> None:
    """Call `measure` on every rank, and print rank 0's text."""
    with same_on_every_rank() as world:
        text = measure(world)
    if world.is_main:
        print(text, flush=True)


def _step(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world: World) -> str:
        config = load_config(args.recipe, args.overrides)
        changes = [change for change in args.against if change != "mae"]
        variants = {change: load_config(args.recipe, [*args.overrides, change]) for change in changes}
        from dmae_ds.bench.step import bench_step

        return bench_step(
            config,
            world,
            against_mae="mae" in args.against,
            variants=variants,
            data=args.data,
            rounds=args.rounds,
            as_json=args.json,
        )

    _print_on_main(measure)


def _growth(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world: World) -> str:
        from dmae_ds.bench.growth import bench_growth

        return bench_growth(
            lambda changes: load_config(args.recipe, [*args.overrides, *changes]),
            world,
            asked={option: getattr(args, option[2:].replace("-", "_")) for option in GROWTH},
            rounds=args.rounds,
            plot=args.plot,
            as_json=args.json,
        )

    _print_on_main(measure)


def _stream(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world: World) -> str:
        config = load_config(args.recipe, args.overrides)
        from dmae_ds.bench.stream import bench_stream

        return bench_stream(
            config, world, stages=args.stages, sleep_ms=args.sleep_ms, ticks=args.clocks, rounds=args.rounds
        )

    _print_on_main(measure)


def _cache(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    config = load_config(args.recipe, args.overrides)
    from dmae_ds.bench.cache import bench_cache

    print(bench_cache(config, dtypes=args.dtype, folder=args.folder, rounds=args.rounds), flush=True)


def _save(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world: World) -> str:
        config = load_config(args.recipe, args.overrides)
        from dmae_ds.bench.save import bench_save

        return bench_save(config, world, steps=args.steps, rounds=args.rounds, folder=args.folder)

    _print_on_main(measure)


def _teacher_load(args: argparse.Namespace) -> None:
    from dmae_ds.bench import bench_teacher_load

    print(bench_teacher_load(args.name, last_block=args.last_block, stages=args.stages, folder=args.folder))


def _knn(args: argparse.Namespace) -> None:
    from dmae_ds.bench.knn import bench_knn

    if args.k > args.train:
        raise UserError(f"--k {args.k} is larger than --train {args.train}; ask for fewer neighbours")
    text = bench_knn(
        num_train=args.train,
        num_queries=args.queries,
        dim=args.dim,
        k=args.k,
        num_classes=args.classes,
        memory_gib=args.memory_gib,
    )
    print(text, flush=True)


def _gpu(args: argparse.Namespace) -> None:
    from dmae_ds.bench.gpu_figures import measure_gpu

    print(measure_gpu(args.out, rehearse=args.rehearse), flush=True)
