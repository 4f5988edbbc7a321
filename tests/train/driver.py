"""Started by the tests under a real launcher: trains several recipes in one start. Arguments: recipe argument lists as JSON."""

import json
import sys

from dmae_ds import dist
from dmae_ds.config.load import load_config
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

world = dist.world_from_env()
device = dist.start(world)
for recipe, *overrides in json.loads(sys.argv[-1]):
    train_recipe(prepare(load_config(recipe, overrides), world, resume="never"), device)
dist.stop()
