"""Stores features undisturbed, then again while starts are killed at random moments until the last one.

Arguments: number of kills, seed, folder of the undisturbed start, folder of the killed ones, then those of
`dmae-ds teacher cache`. Starts are forks of this process, which has imported everything. Prints the number of
complete files after each kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import dmae_ds.tools.teacher_cache  # noqa: F401
from dmae_ds.cli.main import main

num_kills, seed, whole, killed, recipe, *more = sys.argv[1:]
draw, hits = random.Random(int(seed)), 0


def start(out: str) -> int:
    child = os.fork()
    if child == 0:
        os._exit(main(["teacher", "cache", recipe, out, *more]))
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


since = time.monotonic()
assert wait(start(whole)) == 0
seconds = time.monotonic() - since
while hits < int(num_kills):
    child = start(killed)
    time.sleep(draw.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    was_killed = wait(child) == -signal.SIGKILL
    files = sorted(Path(killed).glob("features-*.bin"))
    hits += was_killed
    if was_killed:
        print(len(files), flush=True)
    if not was_killed or len(files) == len(list(Path(whole).glob("features-*.bin"))):
        for file in draw.sample(files, len(files) * 3 // 4):  # so that there is something left to do
            file.unlink()
sys.exit(wait(start(killed)))
