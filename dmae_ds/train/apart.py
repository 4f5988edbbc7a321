"""A training started from Python runs in a process of its own, or in a launcher's.

DeepSpeed keeps process groups for the rest of a process's life, so a second training in it would fail; signal
handlers, threads and kernels of the caller stay as they are, too. The process ends with the one that started
it, however that ends, so that a repeated call finds a run folder that is free.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from dmae_ds.errors import Requeue, RunFailed, UserError
from dmae_ds.output.lines import is_quiet

# Becomes the command behind it, and is killed with its parent (Linux: PR_SET_PDEATHSIG outlives exec).
_TIED = """import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, int(signal.SIGKILL))
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])"""


def train_words(recipe: str | Path, overrides: list[str], *, resume: str) -> list[str]:
    """Arguments of the module dmae_ds that train a recipe."""
    return ["train", str(recipe), *overrides, "--resume", resume, *(["-q"] if is_quiet() else [])]


def run_apart(words: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a command line to its end. Ctrl-C is passed on once: the run saves, then ends.

    Raises UserError, RunFailed or Requeue by its exit code; its own message is on stderr.
    """
    environment = dict(os.environ if environment is None else environment)
    package = str(Path(__file__).resolve().parents[2])  # also where it is imported from a checkout
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    process = subprocess.Popen([sys.executable, "-c", _TIED, str(os.getpid()), *words], env=environment)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # a terminal sends it to both, which counts as one
            process.send_signal(signal.SIGINT)
    if code == 2:
        raise UserError("training refused its recipe; the line above says why")
    if code == os.EX_TEMPFAIL:
        raise Requeue("stopped by a signal after saving; the same call continues")
    if code:
        raise RunFailed(f"training ended with exit code {code}, see above; the same call continues")
