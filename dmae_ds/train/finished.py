"""Whether a run is finished (exit code 0: yes, 3: no).

    python -m dmae_ds.train.finished RECIPE [key=value ...]

For scripts that start a run again until it is finished (launch/train.sh). A launcher's exit code is not
enough: DeepSpeed's is 0 when the process between it and the ranks was killed. It does not import torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dmae_ds.config.load import load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.open import open_train
from dmae_ds.data.order import num_in_share, num_steps
from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint.folder import CheckpointFolder

NOT_YET = 3


def finished(config: RunConfig, *, allow_pipe: bool = False) -> bool:
    """Whether the newest complete checkpoint of a recipe's run folder is that of the last step.

    Raises UserError.
    """
    folder = CheckpointFolder(Path(config.run.dir).expanduser())
    latest = folder.latest()
    if latest is None:
        return False
    shards = open_train(config.data, allow_pipe=allow_pipe)
    num_images = num_in_share(shards.num_samples, config.data.share)
    last = num_steps(config.optim.epochs, num_images, config.optim.global_batch)
    return folder.read_state(latest)["step"] >= last


def main(arguments: list[str]) -> int:
    """Take the arguments of `dmae-ds train`; returns the exit code.

    A mistake in them counts as not finished.
    """
    parser = argparse.ArgumentParser(prog="python -m dmae_ds.train.finished")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--allow-pipe", action="store_true")
    # Without effect on the answer.
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    parser.add_argument("-q", "--quiet", "--dry-run", action="store_true", help=argparse.SUPPRESS)
    # As in `dmae-ds`: argparse stops taking positional arguments behind an option.
    args, more = parser.parse_known_args(arguments)
    try:
        config = load_config(args.recipe, args.overrides + more)
        return 0 if finished(config, allow_pipe=args.allow_pipe) else NOT_YET
    except UserError:
        return NOT_YET


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
