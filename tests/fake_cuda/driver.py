"""Runs jobs on rank 0 of 8 fake ranks, in a process of its own: steps of the Engine, teachers, a reshard.

    python -m tests.fake_cuda.driver JOBS.json

JOBS.json holds a list of objects {"run": a function of jobs.py, its arguments}; prints a line
"RESULT {...}" for each, with "error" where it raised.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

from tests.fake_cuda import accelerator


def main() -> None:
    """Run the jobs of the file that the command names."""
    accelerator.install()
    from torch.nn import functional

    from dmae_ds.plan.python_engine import patched
    from tests.fake_cuda import jobs

    linear = functional.linear  # ZeRO-3 replaces it, also for the jobs that follow
    for job in json.loads(Path(sys.argv[1]).read_text()):
        arguments = dict(job)
        since = time.perf_counter()
        try:
            with patched([(functional, "linear", linear)]):
                result = getattr(jobs, arguments.pop("run"))(**arguments)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        seconds = round(time.perf_counter() - since, 1)
        print("RESULT " + json.dumps({**result, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
