"""Does a list of steps, given as JSON, on every rank; started by the tests under a real launcher.

["train", recipe, key=value, ...]   start or continue a run; every rank prints its RunFailed or UserError
["take", run, step, other run]      copy this run's checkpoint of a step into a new run folder
"""

import json
import shutil
import sys
from pathlib import Path

from dmae_ds.config.load import load_config
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import whole_lines, world_from_env
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

whole_lines()
world = world_from_env()
device = process_group.start(world)
for kind, *what in json.loads(sys.argv[-1]):
    if kind == "take" and world.is_main:
        run, step, other = what
        (Path(other) / "checkpoints").mkdir(parents=True)
        shutil.copytree(
            Path(run) / "checkpoints" / f"step-{step:08d}", Path(other) / "checkpoints" / f"step-{step:08d}"
        )
        (Path(other) / "checkpoints" / "latest").write_text(f"step-{step:08d}")
    collectives.barrier()
    if kind == "train":
        recipe, *overrides = what
        try:
            train_recipe(prepare(load_config(recipe, overrides), world, resume="auto"), device)
        except (RunFailed, UserError) as error:
            print(f"rank {world.rank} stopped: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
process_group.stop()
