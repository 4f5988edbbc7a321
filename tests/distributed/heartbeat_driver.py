"""One rank without a trainer. Arguments: timeout_s, rank, what this rank does once all ranks have begun."""

import contextlib
import functools
import os
import signal
import sys
import time

import torch
from torch import distributed

from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed

timeout_s, rank, fate = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = World(rank, int(os.environ["WORLD_SIZE"]), rank, int(os.environ["WORLD_SIZE"]))
with process_group.joined(world, timeout_s=timeout_s):
    for step in range(3):
        process_group.report(step, "training")
        distributed.all_reduce(torch.ones(1))
    time.sleep(2.5)  # several reports, which are sent once a second
    if fate == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fate == "hangs":
        process_group.report(2, "waiting for data")
        time.sleep(600)
    if fate == "fails":
        raise RunFailed("no space left")
    process_group._watch._detector.on_gpu = fate in ("reads a GPU", "evaluates", "is aborted")
    if fate == "reads a GPU":
        torch.cuda._lazy_init, torch.cuda.device = (lambda: None), contextlib.nullcontext
        torch._C._cuda_synchronize = functools.partial(time.sleep, 600)
        torch.cuda.synchronize()
    if fate == "evaluates":
        process_group.report(3, "evaluating")
        time.sleep(600)
    if fate == "is aborted":  # by NCCL's watchdog, after it has waited too long
        time.sleep(timeout_s)
        os.kill(os.getpid(), signal.SIGABRT)
    if fate == "computes":  # and never sees a broken collective, as on a GPU
        time.sleep(600)
    distributed.all_reduce(torch.ones(1))
