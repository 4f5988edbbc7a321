"""`dmae-ds bench step | teacher-load | stream | save | knn`. Parsers and handlers; torch is imported when one of them needs it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Callable

from dmae_ds.errors import UserError


def add_bench(commands) -> None:
    """Put `bench` and what is below it into the root parser's subparsers."""
    bench = commands.add_parser("bench", help="ratios measured on this machine").add_subparsers(
        required=True, metavar="step | teacher-load | stream | save | knn"
    )
    load = bench.add_parser(
        "teacher-load", help="bytes read and memory of a cut teacher, against the bytes needed"
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
        help="the deepest block that is tapped (default: three quarters of the depth)",
    )
    load.add_argument(
        "--stages",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        metavar="P",
        help="pipeline lengths (default 1 2 4)",
    )
    load.add_argument(
        "--folder",
        type=Path,
        help="where the random weights files are made and left (default: a temporary folder)",
    )
    load.set_defaults(command=_teacher_load)

    step = _with_recipe(
        bench,
        "step",
        "where a training step's time goes, and its share of the fastest matrix product here",
        gives="",
    )
    step.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="mae|KEY=VALUE",
        help="measure a second step beside it, in turns: mae, the same student's without teacher or EMA teacher; or the recipe's with another value. Again for a third",
    )
    step.add_argument(
        "--data",
        action="store_true",
        help="read the recipe's data.train as training does (default: random pixels on the device)",
    )
    step.add_argument(
        "--rounds", type=_at_least_one, default=7, help="of which the median counts (default 7)"
    )
    step.add_argument("--json", action="store_true", help="for machines")
    step.set_defaults(command=_step)

    stream = _with_recipe(
        bench,
        "stream",
        "a teacher in stages against a replicated one and DeepSpeed's eval_batch; start it with a launcher",
        gives="; it gives the teacher's geometry and the micro-batch",
    )
    stream.add_argument(
        "--stages",
        type=int,
        nargs="+",
        metavar="P",
        help="pipeline lengths (default: all that the ranks allow)",
    )
    stream.add_argument(
        "--sleep-ms",
        type=float,
        metavar="MS",
        help="let every block sleep so long instead of computing: the schedule alone",
    )
    stream.add_argument(
        "--clocks", type=_at_least_one, default=16, help="micro-batches a rank in a round (default 16)"
    )
    stream.add_argument(
        "--rounds", type=_at_least_one, default=7, help="rounds, of which the median counts (default 7)"
    )
    stream.set_defaults(command=_stream)

    save = _with_recipe(
        bench,
        "save",
        "bytes and seconds of a checkpoint, against a plain write of as many; start it with a launcher, or alone",
        gives="; it gives the networks, the DeepSpeed file and the batch",
    )
    save.add_argument("--steps", type=_at_least_one, default=3, help="optimiser steps in a round (default 3)")
    save.add_argument(
        "--rounds", type=_at_least_one, default=5, help="rounds, of which the median counts (default 5)"
    )
    save.add_argument(
        "--folder",
        type=Path,
        help="a folder on the disk that is meant; nothing stays in it (default: the temporary folder)",
    )
    save.set_defaults(command=_save)

    knn = bench.add_parser("knn", help="memory and time of eval knn at ImageNet's size, on random features")
    for name, default, what in (
        ("train", 1_281_167, "training rows"),
        ("queries", 2048, "rows to classify"),
        ("dim", 768, "width of a feature"),
        ("k", 20, "neighbours"),
        ("classes", 1000, "classes"),
    ):
        knn.add_argument(
            f"--{name}",
            type=_at_least_one,
            default=default,
            metavar="N",
            help=f"{what} (default {default:,})",
        )
    knn.add_argument(
        "--memory-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="for the search, beyond the features (default 1)",
    )
    knn.set_defaults(command=_knn)


def _with_recipe(bench, name: str, help: str, *, gives: str) -> argparse.ArgumentParser:
    command = bench.add_parser(name, help=help)
    command.add_argument("recipe", help=f"a YAML file, or the name of a shipped recipe{gives}")
    command.add_argument("overrides", nargs="*", metavar="key=value")
    return command


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _on_all_ranks(measure: Callable[..., str]) -> None:
    """Give `measure` this process's World, and print its text on rank 0. A mistake in the recipe is every rank's."""
    from dmae_ds.distributed.world import world_from_env

    world = world_from_env()
    try:
        text = measure(world)
    except UserError as error:
        error.on_every_rank = True
        raise
    if world.is_main:
        print(text, flush=True)


def _step(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world) -> str:
        config = load_config(args.recipe, args.overrides)
        variants = {
            override: load_config(args.recipe, [*args.overrides, override])
            for override in args.against
            if override != "mae"
        }
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

    _on_all_ranks(measure)


def _stream(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world) -> str:
        config = load_config(args.recipe, args.overrides)
        from dmae_ds.bench.stream import bench_stream

        return bench_stream(
            config, world, stages=args.stages, sleep_ms=args.sleep_ms, clocks=args.clocks, rounds=args.rounds
        )

    _on_all_ranks(measure)


def _save(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config

    def measure(world) -> str:
        config = load_config(args.recipe, args.overrides)
        from dmae_ds.bench.save import bench_save

        return bench_save(config, world, steps=args.steps, rounds=args.rounds, folder=args.folder)

    _on_all_ranks(measure)


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
