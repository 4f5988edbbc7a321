"""A loader's worker process ends with the rank that started it, however that ends.

An orphan holds copies of the dead rank's sockets, so the other ranks learn of its death only when torch's own watchdog has
let the orphan go: 5 seconds in which a launcher stops them without a word.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(_: int) -> None:
    """DataLoader's `worker_init_fn`. Off Linux torch's watchdog has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
