"""Entry point of `dmae-ds`: parse arguments, run a command, turn its errors into one line and an exit code.

Exit codes: 0 done; 2 a mistake of the user; 1 the run broke; 75 a signal stopped the run, which has saved;
130 ended by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.cli.bench import add_bench
from dmae_ds.cli.checkpoint import add_checkpoint
from dmae_ds.cli.distill import add_distill
from dmae_ds.cli.doctor import add_doctor
from dmae_ds.cli.environment import prepare_environment
from dmae_ds.cli.eval import add_eval
from dmae_ds.cli.examples import add_examples
from dmae_ds.cli.export import add_export
from dmae_ds.cli.launch_files import add_launch_files
from dmae_ds.cli.plan import add_plan
from dmae_ds.cli.recipes import add_recipes
from dmae_ds.cli.report import add_report
from dmae_ds.cli.teacher import add_teacher
from dmae_ds.cli.train import add_train
from dmae_ds.config.own_code import look_in
from dmae_ds.distributed.tasks import rank_in_env
from dmae_ds.distributed.world import check_device_variable, whole_lines
from dmae_ds.errors import RankLost, Requeue, RunFailed, UserError, line_of, worker_failure
from dmae_ds.output.closed_pipe import EXIT_CODE, stdout_is_closed
from dmae_ds.output.library_warnings import hide_library_warnings
from dmae_ds.output.lines import be_quiet
from dmae_ds.output.local_path import refuse_urls
from dmae_ds.output.parser import OneLineParser

GROUPS = {
    "distill": add_distill,
    "train": add_train,
    "recipes": add_recipes,
    "doctor": add_doctor,
    "checkpoint": add_checkpoint,
    "plan": add_plan,
    "eval": add_eval,
    "export": add_export,
    "report": add_report,
    "teacher": add_teacher,
    "bench": add_bench,
    "launch-files": add_launch_files,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    prepare_environment()
    whole_lines()
    hide_library_warnings()
    root = build_parser()
    args, extra = root.parse_known_args(argv)
    # argparse stops at positionals behind an option: `train RECIPE --resume auto key=value`.
    if extra and (not hasattr(args, "overrides") or any(word.startswith("-") for word in extra)):
        root.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        args.overrides = [*args.overrides, *extra]
    if getattr(args, "quiet", False):
        be_quiet()
    look_in(Path.cwd())  # own code of a recipe: `dmae-ds` itself does not look there
    try:
        check_device_variable()
        problem = refuse_urls(vars(args), command="dmae-ds", may_be_url=["license"])
        if problem is not None:
            raise UserError(problem)
        args.command(args)
    except BrokenPipeError:
        if stdout_is_closed():
            return EXIT_CODE
        raise
    except UserError as error:
        return _print_error(error, code=2)
    except Requeue as error:
        return _print_error(error, code=os.EX_TEMPFAIL)
    except RankLost as error:
        # At once: the heartbeat's thread may wait for a store that is gone.
        os._exit(_print_error(error, code=1))
    except RunFailed as error:
        return _print_error(error, code=1)
    except KeyboardInterrupt:
        print("\ndmae-ds: ended by Ctrl-C", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except RuntimeError as error:
        failure = worker_failure(error)
        if failure is None:
            raise
        return _print_error(failure, code=1)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of every command and option."""
    root = OneLineParser(
        prog="dmae-ds",
        description="Distil large frozen vision transformers into small ones while pre-training.",
    )
    root.add_argument("--version", action="version", version=__version__)
    # DeepSpeed's launcher puts --local_rank=N in front of the arguments; LOCAL_RANK carries the same number.
    root.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    subcommands = root.add_subparsers(required=True, metavar="COMMAND")
    for add in GROUPS.values():
        add(subcommands)
    add_examples(root)
    return root


def _print_error(error: UserError | RunFailed, *, code: int) -> int:
    """Print the error on rank 0, or on the one rank that met it; returns the exit code."""
    rank = rank_in_env()
    if rank == 0 or not error.on_every_rank:
        place = f" (rank {rank})" if rank else ""
        print(line_of(error, place=place), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
