"""`dmae-ds train | eval | report`: parse, check, hand over. Rooms that need torch are imported when they are entered.

A user's mistake is one line and exit code 2; a run that broke is one line and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.errors import RunFailed, UserError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
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
    except RunFailed as error:
        return _say(error, code=1)
    return 0


def _say(error: UserError | RunFailed, *, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not error.on_every_rank:
        print(f"dmae-ds: error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr, flush=True)
    return code


def _train(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.dist import world_from_env
    from dmae_ds.train.preflight import prepare

    try:
        preflight = prepare(load_config(args.recipe, args.overrides), world_from_env(), resume=args.resume)
    except UserError as error:
        error.on_every_rank = True  # the recipe is every rank's
        raise
    from dmae_ds.train.run import run

    run(preflight)


def _eval_knn(args: argparse.Namespace) -> None:
    from dmae_ds.dist import world_from_env
    from dmae_ds.evaluate.knn import evaluate_run

    try:
        world_from_env()  # refuses launchers that start fewer processes than asked for
        evaluate_run(Path(args.run), k=args.k, temperature=args.temperature, pool=args.pool, batch_size=args.batch_size)
    except UserError as error:
        error.on_every_rank = True  # so are the run folder and its shards
        raise


def _report(args: argparse.Namespace) -> None:
    from dmae_ds.report import write_report

    print(write_report([Path(run) for run in args.runs], Path(args.out) if args.out else None))


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    root = argparse.ArgumentParser(prog="dmae-ds", description="Distil large frozen vision transformers into small ones while pre-training.")
    root.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts --local_rank=N in front of the arguments; LOCAL_RANK says the same.
    root.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = root.add_subparsers(required=True, metavar="train | eval | report")

    train = commands.add_parser("train", help="train a recipe, alone or under deepspeed, torchrun or accelerate launch")
    train.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="for example objective.mask_ratio=0.9")
    train.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue from the newest checkpoint if there is one")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("eval", help="what a student is worth").add_subparsers(required=True, metavar="knn")
    knn = evaluate.add_parser("knn", help="weighted k-nearest-neighbour top-1 on frozen features")
    knn.add_argument("run", help="a run folder")
    knn.add_argument("--k", type=int, default=20, help="neighbours (default 20)")
    knn.add_argument("--temperature", type=float, default=0.07, help="of the neighbours' weights exp(cosine / T) (default 0.07)")
    knn.add_argument("--pool", choices=("mean", "cls"), default="mean", help="feature: mean of the patch tokens, or CLS (default mean)")
    knn.add_argument("--batch-size", type=int, default=256)
    knn.set_defaults(command=_eval_knn)

    report = commands.add_parser("report", help="one self-contained HTML page of one run or several")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the first one's holds the page")
    report.add_argument("--out", help="where to write it (default RUN/report.html)")
    report.set_defaults(command=_report)
    return root


if __name__ == "__main__":
    raise SystemExit(main())
