"""Trains recipes and counts what would make the host wait for a GPU, by source line.

On a CPU nothing waits. So DeepSpeed is made to believe that its device does not order its work, as a GPU
does not, and every read of a tensor's value is counted in torch's dispatcher. Started by test_waits.py with
lists of recipe arguments as JSON; prints one JSON object for each recipe.
"""

import contextlib
import json
import sys
import traceback
from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from dmae_ds.config.load import load_config
from dmae_ds.distributed import process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.distributed.world import world_from_env
from dmae_ds.train import run as training
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.metrics import MetricLogger
from dmae_ds.train.preflight import prepare
from dmae_ds.train.run import train_recipe

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "aten.equal")

found: Counter = Counter()
allowed = [False]


def note(what: str) -> None:
    if allowed[0]:
        found["allowed"] += 1
        return
    if any("/torch/utils/data/" in frame.filename for frame in traceback.extract_stack()):
        return  # the loader draws a seed for its workers, once and on the host
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "/torch/" not in frame.filename and frame.filename != __file__
    ]
    found[f"{what} by {frames[-1].filename.split('/')[-1]}:{frames[-1].lineno}"] += 1


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in READS):
            note(str(function))
        return function(*args, **(kwargs or {}))


def allowing(method):
    def wrapped(*args, **kwargs):
        allowed[0] = True
        try:
            return method(*args, **kwargs)
        finally:
            allowed[0] = False

    return wrapped


def counted(train):
    def wrapped(*args, **kwargs):
        with Reads():
            return train(*args, **kwargs)

    return wrapped


world = world_from_env()
device = process_group.start(world)
accelerator = import_deepspeed(device).accelerator.get_accelerator()
accelerator.resolves_data_dependency = lambda: False
accelerator.synchronize = lambda *_: note("synchronize")
MetricLogger.flush, Checkpoints.save = allowing(MetricLogger.flush), allowing(Checkpoints.save)
training.train = counted(training.train)
for recipe, *overrides in json.loads(sys.argv[-1]):
    found.clear()
    with contextlib.redirect_stderr(sys.stdout):
        train_recipe(prepare(load_config(recipe, overrides), world, resume="never"), device)
    if world.is_main:
        print("FOUND " + json.dumps(found), flush=True)
process_group.stop()
