"""`dmae-ds train | doctor | checkpoint | plan | eval | export | report | teacher | bench`: parse, check, hand over. Rooms that need torch are imported when they are entered.

A user's mistake is one line and exit code 2; a run that broke is one line and exit code 1; one that was told to stop, and saved, 75.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.cli.bench import add_bench
from dmae_ds.cli.checkpoint import add_checkpoint
from dmae_ds.cli.doctor import add_doctor
from dmae_ds.cli.eval import add_eval
from dmae_ds.distributed.world import whole_lines
from dmae_ds.errors import RankLost, Requeue, RunFailed, UserError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    whole_lines()
    commands = parser()
    args, extra = commands.parse_known_args(argv)
    # argparse gives up on positionals behind an option: `train RECIPE --resume auto key=value`.
    if extra and (not hasattr(args, "overrides") or any(word.startswith("-") for word in extra)):
        commands.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides += extra
    try:
        args.command(args)
    except UserError as error:
        return _say(error, code=2)
    except Requeue as error:
        return _say(error, code=os.EX_TEMPFAIL)
    except RankLost as error:
        os._exit(_say(error, code=1))  # at once: the heartbeat's thread may be in a store that is gone
    except RunFailed as error:
        return _say(error, code=1)
    return 0


def _say(error: UserError | RunFailed, *, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not error.on_every_rank:
        print(
            f"dmae-ds: {'stopped' if code == os.EX_TEMPFAIL else 'error'}{f' (rank {rank})' if rank else ''}: {error}",
            file=sys.stderr,
            flush=True,
        )
    return code


def _train(args: argparse.Namespace) -> None:
    # Before torch is imported: where a rank is lost its C++ side adds its own frames to the one line that says so.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dmae_ds.config.load import load_config
    from dmae_ds.distributed.world import world_from_env
    from dmae_ds.train.preflight import prepare

    if args.recipe is None:
        from dmae_ds.config.shipped import objective_table

        print(objective_table())
        raise UserError("no recipe to train: name one")
    try:
        preflight = prepare(
            load_config(args.recipe, args.overrides),
            world_from_env(),
            resume=args.resume,
            allow_pipe=args.allow_pipe,
        )
    except UserError as error:
        error.on_every_rank = True  # the recipe is every rank's
        raise
    from dmae_ds.train.run import run

    run(preflight)


def _report(args: argparse.Namespace) -> None:
    runs, out = [Path(run) for run in args.runs], Path(args.out) if args.out else None
    if args.results:
        from dmae_ds.report.results_page import write_results_page

        print(write_results_page(runs, out or Path("RESULTS.md")))
        return
    if not runs:
        raise UserError(
            "name the runs of the page: dmae-ds report RUN [RUN ...]; only --results goes without one"
        )
    from dmae_ds.report import write_report

    print(write_report(runs, out))


def _export(args: argparse.Namespace) -> None:
    from dmae_ds.export.export import describe, export

    print(
        describe(
            *export(
                Path(args.run),
                to=args.to,
                what=args.what,
                out=Path(args.out) if args.out else None,
                license=args.license,
            )
        )
    )


def _plan(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.plan.cost import Machine
    from dmae_ds.plan.table import plan

    machine = Machine(
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node or args.gpus,
        memory_gib=args.gpu_memory_gib,
        tflops=args.tflops,
        link_gbps=args.link_gbps,
        node_link_gbps=args.node_link_gbps,
    )
    print(
        plan(
            load_config(args.recipe, args.overrides),
            machine,
            recipe=args.recipe,
            overrides=args.overrides,
            images=args.images,
        )
    )


def _teacher_inspect(args: argparse.Namespace) -> None:
    from dmae_ds.tools.teacher_inspect import inspect

    print(
        inspect(
            Path(args.file), name=args.name, overrides=args.overrides, format=args.format, write=args.write
        )
    )


def _teacher_slice(args: argparse.Namespace) -> None:
    from dmae_ds.tools.teacher_slice import slice_teacher

    print(
        slice_teacher(
            Path(args.file),
            Path(args.out),
            num_stages=args.stages,
            name=args.name,
            overrides=args.overrides,
            format=args.format,
            dtype=args.dtype,
            last_block=args.last_block,
        )
    )


def _teacher_stats(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.tools.teacher_stats import write_stats

    print(
        write_stats(
            load_config(args.recipe, args.overrides),
            num_images=args.images,
            out=Path(args.out) if args.out else None,
        )
    )


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    root = argparse.ArgumentParser(
        prog="dmae-ds",
        description="Distil large frozen vision transformers into small ones while pre-training.",
    )
    root.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts --local_rank=N in front of the arguments; LOCAL_RANK says the same.
    root.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = root.add_subparsers(
        required=True, metavar="train | doctor | checkpoint | plan | eval | export | report | teacher | bench"
    )

    train = commands.add_parser(
        "train", help="train a recipe, alone or under deepspeed, torchrun or accelerate launch"
    )
    train.add_argument(
        "recipe",
        nargs="?",
        help="a YAML file, or the name of a shipped recipe; without one, the objectives are listed",
    )
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example objective.mask_ratio=0.9"
    )
    train.add_argument(
        "--resume",
        choices=("never", "auto"),
        default="never",
        help="auto: continue from the newest checkpoint if there is one",
    )
    train.add_argument(
        "--allow-pipe",
        action="store_true",
        help="let data.train be a pipe: URL, which runs its command in a shell",
    )
    train.set_defaults(command=_train)

    add_doctor(commands)
    add_checkpoint(commands)
    add_eval(commands)

    report = commands.add_parser("report", help="one self-contained HTML page of one run or several")
    report.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run folders; the first one's holds the page; with --results also folders of runs",
    )
    report.add_argument("--out", help="where to write it (default RUN/report.html, or RESULTS.md)")
    report.add_argument(
        "--results",
        action="store_true",
        help="RESULTS.md instead: the papers' tables next to these runs, and every setting over its seeds",
    )
    report.set_defaults(command=_report)

    export = commands.add_parser(
        "export", help="the student in another library's layout, loaded back by it and compared, with a card"
    )
    export.add_argument(
        "run", help="a run folder; for a classifier, the folder that eval finetune or linear wrote"
    )
    export.add_argument(
        "--to",
        choices=("timm", "hf", "onnx", "safetensors"),
        required=True,
        help="whose layout; hf is transformers",
    )
    export.add_argument(
        "--what",
        choices=("encoder", "mae", "classifier"),
        default="encoder",
        help="encoder (default); mae: with the pixel decoder (hf)",
    )
    export.add_argument("--out", metavar="DIR", help="where to write it (default RUN/export/<to>)")
    export.add_argument(
        "--license",
        metavar="ID",
        default="unknown",
        help="under which these weights may be used, for the card (default unknown)",
    )
    export.set_defaults(command=_export)

    plan = commands.add_parser(
        "plan",
        help="memory, traffic and time of a recipe on GPUs that needn't be here, and where its teacher should live",
    )
    plan.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="in all (default 8)")
    plan.add_argument("--gpus-per-node", type=int, metavar="N", help="default: all of them")
    plan.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, metavar="GIB", help="of a GPU (default 80)"
    )
    plan.add_argument(
        "--tflops", type=float, default=300.0, help="a GPU's peak in the recipe's precision (default 300)"
    )
    plan.add_argument(
        "--link-gbps", type=float, default=400.0, metavar="GBPS", help="Gbit/s out of a node (default 400)"
    )
    plan.add_argument(
        "--node-link-gbps",
        type=float,
        default=2400.0,
        metavar="GBPS",
        help="Gbit/s of a GPU inside a node (default 2400)",
    )
    plan.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="of an epoch (default: data.train's, or ImageNet-1k's 1,281,167)",
    )
    plan.set_defaults(command=_plan)

    teacher = commands.add_parser("teacher", help="look at, cut or measure a teacher").add_subparsers(
        required=True, metavar="inspect | slice | stats"
    )
    inspect = teacher.add_parser("inspect", help="what a weights file is, and which recipes it can serve")
    inspect.add_argument(
        "--write",
        action="store_true",
        help="store the fingerprint beside the file; every run compares its teacher with it",
    )
    inspect.set_defaults(command=_teacher_inspect)
    cut = teacher.add_parser(
        "slice", help="cut a teacher once: one safetensors file a pipeline stage, with the needed blocks only"
    )
    for command in (inspect, cut):
        command.add_argument("file", help="a weights file, an index of parts, or a folder")
        if command is cut:
            command.add_argument("out", help="the folder to write")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="numbers that differ from the name's, for example img_size=196",
        )
        command.add_argument(
            "--name", help="the teacher's timm name (default: the one known network that fits)"
        )
        command.add_argument(
            "--format", default="auto", help="the file's key map (default auto: the one that fits)"
        )
    cut.add_argument("--stages", type=int, default=1, metavar="P", help="how many files (default 1)")
    cut.add_argument(
        "--last-block",
        type=int,
        metavar="K",
        help="the deepest block that is tapped (default: three quarters of the depth)",
    )
    cut.add_argument("--dtype", choices=("fp32", "bf16"), help="store as (default: as in the file)")
    cut.set_defaults(command=_teacher_slice)
    stats = teacher.add_parser(
        "stats",
        help="one pass over the data for teacher.standardize: mean and covariance of the recipe's targets",
    )
    stats.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    stats.add_argument("overrides", nargs="*", metavar="key=value")
    stats.add_argument(
        "--images", type=int, default=10_000, help="how many (default 10,000, or all if there are fewer)"
    )
    stats.add_argument("--out", help="where to write (default: beside the weights)")
    stats.set_defaults(command=_teacher_stats)

    add_bench(commands)
    return root


if __name__ == "__main__":
    raise SystemExit(main())
