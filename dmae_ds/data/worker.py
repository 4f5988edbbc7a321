"""A loader's worker process ends with the rank that started it, however that ends, and no sooner.

An orphan holds copies of the dead rank's sockets, so the other ranks learn of its death only when torch's own watchdog has
let the orphan go: 5 seconds in which a launcher stops them without a word. And launchers send SIGTERM to a rank's whole
tree of processes: a worker that obeyed would break the step that the rank is finishing before it saves.
"""

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(_: int) -> None:
    """DataLoader's `worker_init_fn`. Off Linux torch's watchdog, and the signals' own meaning, have to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signals = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_obey, args=(os.getppid(), signals), daemon=True).start()


def _obey(parent: int, signals: set[signal.Signals]) -> None:
    """End at a signal from the parent: multiprocessing's own, which then waits for the worker."""
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)
