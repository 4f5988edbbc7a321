"""`dmae-ds teacher inspect | slice | stats | cache`: arguments; torch is imported when a command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dmae_ds.cli.arguments import add_quiet, add_recipe
from dmae_ds.cli.ranks import same_on_every_rank


def add_teacher(subcommands) -> None:
    """Add `teacher` and its subcommands to the root parser."""
    teacher = subcommands.add_parser(
        "teacher", help="inspect, cut or measure a teacher, or store its features"
    )
    kinds = teacher.add_subparsers(required=True, metavar="inspect | slice | stats | cache")
    _add_inspect(kinds)
    _add_slice(kinds)
    _add_stats(kinds)
    _add_cache(kinds)


def _add_inspect(kinds) -> None:
    inspect = kinds.add_parser("inspect", help="which network a weights file holds, and for which recipes")
    inspect.add_argument("file", metavar="FILE", help="a weights file, an index of parts, or a folder")
    _add_network(inspect)
    inspect.add_argument(
        "--write",
        action="store_true",
        help="store the fingerprint next to the file; every run compares its teacher with it",
    )
    inspect.set_defaults(command=_inspect)


def _add_slice(kinds) -> None:
    cut = kinds.add_parser(
        "slice", help="cut a teacher once: one safetensors file for each pipeline stage, needed blocks only"
    )
    cut.add_argument("file", metavar="FILE", help="a weights file, an index of parts, or a folder")
    cut.add_argument("out", metavar="OUT", help="the folder to write")
    _add_network(cut)
    cut.add_argument("--stages", type=int, default=1, metavar="P", help="number of files (default 1)")
    cut.add_argument(
        "--last-block",
        type=int,
        metavar="K",
        help="the deepest tapped block (default: three quarters of the depth)",
    )
    cut.add_argument("--dtype", choices=("fp32", "bf16"), help="dtype to store (default: the file's)")
    cut.set_defaults(command=_slice)


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="numbers in which the network differs from its name's, for example img_size=196",
    )
    command.add_argument(
        "--name", help="the teacher's timm name (default: the one known network that fits the file)"
    )
    command.add_argument(
        "--format", default="auto", help="the file's key map (default auto: the one that fits)"
    )


def _add_stats(kinds) -> None:
    stats = kinds.add_parser(
        "stats",
        help="mean and covariance of the recipe's targets, for teacher.standardize: one pass over the data",
    )
    add_recipe(stats)
    stats.add_argument(
        "--images",
        type=int,
        default=10_000,
        metavar="N",
        help="number of images (default 10,000, or all if there are fewer)",
    )
    stats.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write, or of several teachers a folder (default: next to the weights)",
    )
    stats.set_defaults(command=_stats)


def _add_cache(kinds) -> None:
    cache = kinds.add_parser(
        "cache",
        help="store the teacher's features of a run, for teacher.placement=cache; also under a launcher",
    )
    cache.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    cache.add_argument("out", metavar="OUT", help="the folder to write, or to continue")
    cache.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change keys of the recipe, as for the run"
    )
    cache.add_argument(
        "--epochs", type=float, metavar="E", help="epochs whose features are stored (default: all of the run)"
    )
    cache.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16", "int8"),
        help="dtype to store (default: the features' own, so that nothing is lost)",
    )
    cache.add_argument(
        "--pca", type=int, metavar="D", help="store the D directions of most variance (default: all)"
    )
    cache.add_argument("--teacher", default="", metavar="NAME", help="which of several teachers")
    add_quiet(cache)
    cache.set_defaults(command=_cache)


def _inspect(args: argparse.Namespace) -> None:
    _check_file(args)
    from dmae_ds.tools.teacher_inspect import inspect

    text = inspect(
        Path(args.file), name=args.name, overrides=args.overrides, format=args.format, write=args.write
    )
    print(text)


def _check_file(args: argparse.Namespace) -> None:
    """Raise UserError for what can be known of the file without torch."""
    from dmae_ds.tools.early import check_teacher

    check_teacher(Path(args.file), name=args.name, overrides=args.overrides, format=args.format)


def _slice(args: argparse.Namespace) -> None:
    from dmae_ds.tools.early import check_slice

    _check_file(args)
    check_slice(Path(args.file), Path(args.out), num_stages=args.stages, last_block=args.last_block)
    from dmae_ds.tools.teacher_slice import slice_teacher

    text = slice_teacher(
        Path(args.file),
        Path(args.out),
        num_stages=args.stages,
        name=args.name,
        overrides=args.overrides,
        format=args.format,
        dtype=args.dtype,
        last_block=args.last_block,
    )
    print(text)


def _stats(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.tools.early import check_stats

    config, out = load_config(args.recipe, args.overrides), Path(args.out) if args.out else None
    check_stats(config, num_images=args.images, out=out)
    from dmae_ds.tools.teacher_stats import write_stats

    print(write_stats(config, num_images=args.images, out=out))


def _cache(args: argparse.Namespace) -> None:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported, as for `train`
    from dmae_ds.config.load import load_config
    from dmae_ds.tools.early import CacheRequest, prepare_cache

    request = CacheRequest(
        Path(args.out), epochs=args.epochs, dtype=args.dtype, pca=args.pca, teacher=args.teacher
    )
    with same_on_every_rank() as world:
        preflight = prepare_cache(load_config(args.recipe, args.overrides), world, request)
    from dmae_ds.tools.teacher_cache import write_cache

    text = write_cache(preflight, request)
    if world.is_main:
        print(text)
