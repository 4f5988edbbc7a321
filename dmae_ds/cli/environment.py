"""Variables that count only before torch is loaded, set where nobody has set them.

launch/environment.sh sets the same for the processes between a launch script and the ranks.
"""

from __future__ import annotations

import os

SPINS = "3000"  # of GNU's OpenMP, which torch's wheels for Linux bring; its own default is 300,000


def prepare_environment() -> None:
    """Choose how this process waits and keeps GPU memory; call it before torch is imported.

    Where others share the cores, a thread that spins while it waits takes the core of one that works. Never
    to spin (OMP_WAIT_POLICY=passive) costs small networks a quarter on an idle machine; so few spins cost
    nothing (BENCHMARKS.md). Batches of several sizes leave holes in segments of GPU memory that do not grow.
    Neither changes a number.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    # torch 2.9 ignores the newer of the two names on CUDA.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
