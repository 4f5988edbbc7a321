"""Peak memory of training steps, each in processes of its own: what another step left behind counts nowhere.

The processes are forked by a server that has imported everything and built nothing. Two measure a step, and
the larger peak counts: of digits_dmae, eight processes measured 200 to 206 MiB, a ninth 184. About 40 MiB are
pages of libraries, which the first step touches.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from dmae_ds.bench.training_step import TrainingStep
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import process_group
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed
from dmae_ds.train.peak_memory import PeakMemory

NUM_PROCESSES = 2  # that measure one step


def measure_peaks(recipes: dict[str, RunConfig]) -> dict[str, int | None]:
    """Bytes at the peak of a step of each recipe, one after the other; None where the system tells none.

    Raises UserError for a recipe that can't be built, RunFailed where a process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def in_process(name: str) -> int | None:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                return pool.submit(step_peak, recipes[name]).result()
            except BrokenProcessPool:
                raise RunFailed(
                    f"the process that measures the memory of {name} was killed; if memory ran out, lower "
                    "optim.micro_batch"
                ) from None

    measured = {name: [in_process(name) for _ in range(NUM_PROCESSES)] for name in recipes}
    return {name: None if None in peaks else max(peaks) for name, peaks in measured.items()}


def step_peak(config: RunConfig) -> int | None:
    """Build a step, take it twice, and return the most bytes that this process had on top of the start's."""
    world = World()
    with process_group.joined(world, timeout_s=config.dist.timeout_s) as device:
        import_deepspeed(device)
        watch = PeakMemory(device)
        step = TrainingStep(config, world=world, device=device, data=False)
        for _ in range(2):  # AdamW's moments are allocated in the first
            step.take()
        return watch.peak() if watch.can_measure else None
