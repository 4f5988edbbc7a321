"""Starting a recipe on the ranks of this machine: in this process, or by DeepSpeed's launcher."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from dmae_ds.config.load import load_config
from dmae_ds.distributed.world import World
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.start import Launch
from dmae_ds.errors import RunFailed
from dmae_ds.output.lines import say
from dmae_ds.train.apart import run_apart, train_words
from dmae_ds.train.finished import finished
from dmae_ds.train.preflight import describe_finished, prepare


def start(recipe: Path, num_ranks: int, *, in_place: bool) -> None:
    """Train a recipe, or continue to.

    in_place: one rank trains in this process; with several, this process becomes the launcher and doesn't
      return, so that whatever ends it ends the ranks. False: training has processes of its own
    Raises UserError, RunFailed or Requeue as `dmae_ds.train` does.
    """
    preflight = prepare(load_config(str(recipe)), World(size=num_ranks), resume="auto")
    if preflight.is_finished:
        say(describe_finished(preflight))
    elif num_ranks > 1:
        words, environment = launch(recipe, num_ranks)
        if not in_place:
            run_apart(words, environment)
            if not finished(preflight.config):  # a launcher that was killed may end with 0
                raise RunFailed("the launcher ended before the run was finished; the same call continues")
            return
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(words[0], words, environment)
    elif in_place:
        from dmae_ds.train.run import run

        run(preflight)
    else:
        run_apart([sys.executable, "-m", "dmae_ds", *train_words(recipe, [], resume="auto")])


def launch(recipe: Path, num_ranks: int) -> tuple[list[str], dict[str, str]]:
    """The launcher's command line for so many ranks of this machine, and its environment."""
    node = Launch("alone", [Node("localhost", num_ranks)], _free_port())
    words = node.words(["dmae_ds", *train_words(recipe, [], resume="auto")])
    in_environment = Path(sys.executable).with_name(words[0])  # also where the environment is not activated
    words[0] = str(in_environment) if in_environment.exists() else shutil.which(words[0]) or words[0]
    environment = dict(os.environ)
    if "--include" in words:  # DeepSpeed's launcher sets the variable for each rank
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    return words, environment


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
