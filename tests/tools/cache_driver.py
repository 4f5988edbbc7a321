"""Stores features and trains recipes in one start; started by the tests, alone or under a real launcher.

Arguments: a list of ["store", options of CacheRequest, recipe arguments] and ["train", {}, recipe arguments],
as JSON.
"""

import json
import sys
from pathlib import Path

from dmae_ds.config.load import load_config
from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import world_from_env
from dmae_ds.tools.early import CacheRequest, prepare_cache
from dmae_ds.tools.teacher_cache import store_features
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

world = world_from_env()
device = process_group.start(world)
for kind, options, (recipe, *overrides) in json.loads(sys.argv[-1]):
    config = load_config(recipe, overrides)
    if kind == "store":
        request = CacheRequest(**{**options, "out": Path(options["out"])})
        store_features(prepare_cache(config, world, request), request, device)
    else:
        train_recipe(prepare(config, world, resume="never"), device)
process_group.stop()
