"""`dmae-ds train`: arguments, and the checks that need no torch."""

from __future__ import annotations

import argparse
import os
import sys

from dmae_ds import __version__
from dmae_ds.cli.arguments import add_quiet, add_recipe
from dmae_ds.cli.ranks import same_on_every_rank
from dmae_ds.distributed.tasks import rank_in_env
from dmae_ds.errors import UserError
from dmae_ds.output.lines import say


def add_train(subcommands) -> None:
    """Add `train` to the root parser."""
    train = subcommands.add_parser(
        "train", help="train a recipe, in one process or under deepspeed, torchrun or accelerate launch"
    )
    add_recipe(train, note="; without one, the objectives are listed", optional=True)
    train.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: continue from the newest checkpoint if there is one (default never)",
    )
    train.add_argument(
        "--allow-pipe",
        action="store_true",
        help="allow data.train to be a pipe: URL, whose command is run by a shell",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="build the networks, print the summary that a run begins with, and stop; nothing is written",
    )
    add_quiet(train)
    train.set_defaults(command=_train)


def _train(args: argparse.Namespace) -> None:
    # Set before torch is imported: its C++ code would add stack frames to the one line about a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dmae_ds.config.load import load_config
    from dmae_ds.train.preflight import describe_finished, prepare

    if args.recipe is None:
        from dmae_ds.config.shipped import objective_table

        print(objective_table())
        raise UserError("no recipe was given; name one of those listed above, or a YAML file")
    on_terminal = sys.stderr.isatty() and rank_in_env() == 0
    if on_terminal:
        say(f"dmae-ds {__version__}: reading {args.recipe}")
    with same_on_every_rank() as world:
        config = load_config(args.recipe, args.overrides)
        preflight = prepare(config, world, resume=args.resume, allow_pipe=args.allow_pipe)
    if preflight.is_finished:
        if world.is_main:
            say(describe_finished(preflight))
        return
    if on_terminal:
        say("recipe and data are checked; starting torch and DeepSpeed")
    if args.dry_run:
        from dmae_ds.train.dry_run import print_summary

        print_summary(preflight)
        return
    from dmae_ds.train.run import run

    run(preflight)
