"""`dmae-ds doctor ...`: what would stop a run on these machines. Parser and handler; a node's facts are gathered in processes of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.errors import UserError


def add_doctor(commands) -> None:
    """Put `doctor` into the root parser's subparsers."""
    doctor = commands.add_parser(
        "doctor",
        help="before a run: what would stop it on these nodes, how to mend that, and the command that starts it",
    )
    doctor.add_argument(
        "recipe",
        nargs="?",
        help="a YAML file, or the name of a shipped recipe (without one nothing is said of data and checkpoints)",
    )
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    doctor.add_argument(
        "--hostfile",
        "-H",
        type=Path,
        metavar="F",
        help="one line a node: NAME slots=RANKS; all are asked over ssh (default: this machine)",
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
        help="of the first node (default: the first that `hostname -I` says there, as for deepspeed)",
    )
    doctor.add_argument(
        "--master_port",
        type=int,
        default=29500,
        metavar="P",
        help="where the ranks will meet (default 29500)",
    )
    doctor.add_argument(
        "--no_ssh",
        action="store_true",
        help="nodes that cannot ssh: start this on every one, with --node_rank and --master_addr",
    )
    doctor.add_argument("--node_rank", type=int, metavar="N", help="of this node, from 0; with --no_ssh")
    doctor.add_argument(
        "--num_nodes",
        type=int,
        metavar="M",
        help="with --no_ssh and no --hostfile: how many; they are then started by torchrun",
    )
    doctor.add_argument(
        "--no-start",
        action="store_false",
        dest="start",
        help="leave out the all-reduce, the only check that starts ranks",
    )
    doctor.add_argument("--allow-pipe", action="store_true", help="as for train")
    doctor.add_argument(
        "--limit_s", type=float, default=120.0, metavar="S", help="for each step on each node (default 120)"
    )
    doctor.set_defaults(command=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    from dmae_ds.doctor import over_ssh, without_ssh
    from dmae_ds.doctor.examine import Question

    if args.recipe is not None and "=" in args.recipe and not Path(args.recipe).exists():
        raise UserError(
            f"'{args.recipe}' stands where the recipe belongs; write dmae-ds doctor RECIPE [key=value ...]"
        )
    if args.no_ssh != (args.node_rank is not None):
        raise UserError(
            "--no_ssh and --node_rank go together: start the doctor on every node, each with its own --node_rank"
        )
    if args.num_nodes is not None and not args.no_ssh:
        raise UserError("--num_nodes is of use with --no_ssh alone; a --hostfile names its nodes")
    if args.no_ssh and args.hostfile is None and args.num_nodes is None:
        raise UserError("--no_ssh needs to know the nodes: give --hostfile, or --num_nodes")
    if (
        not 1 <= args.master_port <= 65535
        or args.limit_s < 1
        or min(args.num_gpus or 1, args.num_nodes or 1) < 1
    ):
        raise UserError(
            "--master_port is 1 to 65535, --limit_s at least 1, --num_gpus and --num_nodes at least 1"
        )
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
