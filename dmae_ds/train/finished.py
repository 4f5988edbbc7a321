"""Whether a run is through: python -m dmae_ds.train.finished RECIPE [key=value ...]   (exit code 0: yes, 3: no; no torch)

For scripts that start a run again until it is (launch/train.sh). A launcher's exit code isn't enough: DeepSpeed's says 0 when
the process between it and the ranks was killed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dmae_ds.config.load import load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.open import open_train
from dmae_ds.data.order import num_steps
from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint.folder import CheckpointFolder

NOT_YET = 3


def finished(config: RunConfig, *, allow_pipe: bool = False) -> bool:
    """Whether the newest whole checkpoint of a recipe's run folder is of its last step. Raises UserError."""
    folder = CheckpointFolder(Path(config.run.dir).expanduser())
    latest = folder.latest()
    if latest is None:
        return False
    shards = open_train(config.data, allow_pipe=allow_pipe)
    return folder.read_state(latest)["step"] >= num_steps(
        config.optim.epochs, shards.num_samples, config.optim.global_batch
    )


def main(arguments: list[str]) -> int:
    """Takes the arguments of `dmae-ds train`. A mistake in them is left to `train`, which says it."""
    parser = argparse.ArgumentParser(prog="python -m dmae_ds.train.finished")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--allow-pipe", action="store_true")
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args(
        arguments
    )  # as in cli.py: argparse gives up on positionals behind an option
    try:
        return (
            0
            if finished(load_config(args.recipe, args.overrides + more), allow_pipe=args.allow_pipe)
            else NOT_YET
        )
    except UserError:
        return NOT_YET


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
