"""Trains a recipe and kills itself with SIGKILL at a moment of its second save; started by the tests.

Arguments: the moment, the recipe as JSON. The moments:

    files     rank 1 (rank 0 of one rank) has written its last file
    written   every file exists, state.json does not
    sealed    state.json exists, `latest` does not name it
    moved     `latest` has moved, the exported files have no names yet
    named     one of the two exported files has its name
    cleared   an old checkpoint has lost its state.json
"""

import json
import os
import shutil
import signal
import sys

from dmae_ds.config.load import load_config
from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import world_from_env
from dmae_ds.train.checkpoint import folder as checkpoint_folder
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

moment, recipe = sys.argv[-2], json.loads(sys.argv[-1])
world = world_from_env()
device = process_group.start(world)
from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine  # noqa: E402


def die_in(
    owner: object, name: str, *, at: int, after: bool = False, when=lambda *args: True, of_rank: int = 0
) -> None:
    """Kill this process before (or after) the at-th call for which `when` holds."""
    operation, calls = getattr(owner, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += when(*args)
        last = calls == at and when(*args) and world.rank == of_rank
        result = operation(*args, **kwargs) if after or not last else None
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def named(end: str):
    return lambda path, *rest: str(path).endswith(end)


if moment == "files":
    die_in(SafeCheckpointEngine, "save", at=2 if world.size > 1 else 4, after=True, of_rank=world.size - 1)
elif moment == "written":
    die_in(checkpoint_folder, "write_atomically", at=2, when=named("state.json"))
elif moment == "sealed":
    die_in(checkpoint_folder, "write_atomically", at=2, when=named("latest"))
elif moment == "moved":
    die_in(checkpoint_folder, "write_atomically", at=2, after=True, when=named("latest"))
elif moment == "named":
    die_in(os, "replace", at=2, after=True, when=named("student.safetensors.tmp"))
elif moment == "cleared":
    die_in(shutil, "rmtree", at=1, when=lambda path, *rest: "step-" in str(path))
else:
    raise SystemExit(f"no such moment: {moment}")
train_recipe(prepare(load_config(recipe[0], recipe[1:]), world, resume="auto"), device)
