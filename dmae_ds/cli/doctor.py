"""`dmae-ds doctor`: arguments and their checks; each node's facts are gathered by processes of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.cli.arguments import add_recipe
from dmae_ds.errors import UserError


def add_doctor(subcommands) -> None:
    """Add `doctor` to the root parser."""
    doctor = subcommands.add_parser(
        "doctor",
        help="check the nodes before a run: what would stop it, how to fix that, which command starts it",
    )
    add_recipe(doctor, note="; without one, data and checkpoints are not checked", optional=True)
    _add_nodes(doctor)
    doctor.add_argument(
        "--no-start",
        action="store_false",
        dest="start",
        help="leave out the all-reduce, the only check that starts ranks",
    )
    doctor.add_argument("--allow-pipe", action="store_true", help="allow a pipe: URL, as for train")
    doctor.add_argument(
        "--limit_s",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds that each step may take on each node (default 120)",
    )
    doctor.set_defaults(command=_doctor)


def _add_nodes(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument(
        "--hostfile",
        "-H",
        type=Path,
        metavar="F",
        help="a line for each node: NAME slots=RANKS; all are reached over ssh (default: this machine)",
    )
    doctor.add_argument(
        "--num_gpus",
        type=int,
        metavar="N",
        help="ranks on this machine, or without --hostfile on each node (default: its GPUs, else 1)",
    )
    doctor.add_argument(
        "--master_addr",
        metavar="A",
        help="address of the first node (default: the first of `hostname -I` there, as for deepspeed)",
    )
    doctor.add_argument(
        "--master_port",
        type=int,
        default=29500,
        metavar="P",
        help="port on the first node where the ranks meet (default 29500)",
    )
    doctor.add_argument(
        "--no_ssh",
        action="store_true",
        help="for nodes without ssh: start this command on every node, with --node_rank and --master_addr",
    )
    doctor.add_argument(
        "--node_rank", type=int, metavar="N", help="number of this node, from 0; requires --no_ssh"
    )
    doctor.add_argument(
        "--num_nodes",
        type=int,
        metavar="M",
        help="number of nodes; requires --no_ssh, replaces --hostfile; the run is then started by torchrun",
    )


def _doctor(args: argparse.Namespace) -> None:
    from dmae_ds.doctor import over_ssh, without_ssh
    from dmae_ds.doctor.checklist import Question

    _check(args)
    question = Question(
        recipe=args.recipe,
        overrides=args.overrides,
        hostfile=args.hostfile,
        num_ranks=args.num_gpus,
        port=args.master_port,
        address=args.master_addr,
        node_rank=args.node_rank,
        num_nodes=args.num_nodes,
        start=args.start,
        allow_pipe=args.allow_pipe,
        limit_s=args.limit_s,
    )
    examine = without_ssh.examine if args.no_ssh else over_ssh.examine
    if not examine(question):
        raise SystemExit(1)


def _check(args: argparse.Namespace) -> None:
    """Raise UserError where options contradict each other or a number is out of range."""
    if args.recipe is not None and "=" in args.recipe and not Path(args.recipe).exists():
        raise UserError(f"'{args.recipe}' is not a recipe; write dmae-ds doctor RECIPE [key=value ...]")
    if args.no_ssh != (args.node_rank is not None):
        raise UserError(
            "--no_ssh and --node_rank go together; start the doctor on every node, each with its --node_rank"
        )
    if args.num_nodes is not None and not args.no_ssh:
        raise UserError("--num_nodes requires --no_ssh; with --hostfile the nodes are those of the file")
    if args.no_ssh and args.hostfile is None and args.num_nodes is None:
        raise UserError("--no_ssh requires --hostfile, or --num_nodes, to know the nodes")
    if not 1 <= args.master_port <= 65535:
        raise UserError(f"--master_port {args.master_port} is out of range; give 1 to 65535")
    for option in ("limit_s", "num_gpus", "num_nodes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value:g} is too small; give 1 or more")
