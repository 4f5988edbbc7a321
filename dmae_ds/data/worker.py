"""A loader's worker process ends when the rank that started it ends, however that happens, and not earlier.

An orphaned worker holds copies of the dead rank's sockets. The other ranks would learn of the death only when
torch's watchdog ends the orphan, 5 seconds later; by then a launcher may have stopped them without a message.
Launchers also
send SIGTERM to all processes of a rank, and a terminal sends Ctrl-C to all of a command: a worker that ended
then would break the step that the rank finishes before it saves.
"""

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(_: int) -> None:
    """Tie this worker to its parent process; DataLoader's `worker_init_fn`.

    Only on Linux: elsewhere torch's watchdog ends workers, and SIGTERM keeps its usual meaning.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signals = {signal.SIGTERM, signal.SIGUSR1}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=_end_on_signal, args=(os.getppid(), signals), daemon=True).start()


def _end_on_signal(parent: int, signals: set[signal.Signals]) -> None:
    """End at a signal from the parent process, which multiprocessing sends before it waits for the worker."""
    while signal.sigwaitinfo(signals).si_pid != parent:
        pass
    os._exit(0)
