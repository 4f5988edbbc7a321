"""Trains several recipes in one start; started by the tests under a real launcher.

Arguments: lists of recipe arguments, as JSON.
"""

import json
import sys
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from dmae_ds.config.load import load_config
from dmae_ds.distributed import process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.distributed.world import world_from_env
from dmae_ds.train import networks
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

world = world_from_env()
device = process_group.start(world)
# fp16 is refused on CPUs, for it is slow; DeepSpeed's engine runs it there once it is told that it may.
networks.check_precision = lambda *_: None
type(import_deepspeed(device).accelerator.get_accelerator()).is_fp16_supported = lambda self: True
for recipe, *overrides in json.loads(sys.argv[-1]):
    config = load_config(recipe, overrides)
    train_recipe(prepare(config, world, resume="never"), device)
    assert torch.are_deterministic_algorithms_enabled() == config.run.deterministic
    # Also ZeRO's own groups, which would wait half an hour by default.
    waits = [group._get_backend(device).options._timeout for group in distributed_c10d._world.pg_map]
    assert len(waits) > 1 and set(waits) == {timedelta(seconds=process_group.TIMEOUT_S)}, waits
process_group.stop()
