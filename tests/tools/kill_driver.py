"""Kills `dmae-ds teacher cache` at random moments until it was hit often enough, then lets it end.

Arguments: number of kills, seed, seconds of an undisturbed start, arguments of `dmae-ds`. Starts are forks
of this process, which has imported everything. Prints the number of features files after each kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import dmae_ds.tools.teacher_cache  # noqa: F401
from dmae_ds.cli.main import main
from dmae_ds.distributed.deepspeed_import import import_deepspeed  # noqa: F401

num_kills, seed, whole_s, *arguments = sys.argv[1:]
draw, out, hits = random.Random(int(seed)), Path(arguments[3]), 0


def start() -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(arguments))
    return child


while hits < int(num_kills):
    child = start()
    time.sleep(draw.uniform(0, float(whole_s)))
    os.kill(child, signal.SIGKILL)
    hits += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(len(list(out.glob("features-*.bin"))), flush=True)
    for first in sorted(out.glob("features-*.bin"))[:1] if hits % 5 == 4 else []:
        first.unlink()  # so that there is something left to do
sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))
