"""Run `dmae_ds`, and log which samples each rank trained on at each step; tests start this instead.

    SAMPLES_LOG=folder deepspeed ... tests/train/counting.py train RECIPE ...

MetricLogger has the ids of a step already, for the message about a loss that is not finite.
"""

import json
import os
import sys
import time
from pathlib import Path

from dmae_ds.cli.main import main
from dmae_ds.train.metrics import MetricLogger

end_step, lives = MetricLogger.end_step, f"{time.time_ns()}-{os.getpid()}"


def end_step_and_note(self: MetricLogger, step: int, lr: float) -> None:
    ids = [number for of_micro_batch in self._ids for number in of_micro_batch.tolist()]
    with open(Path(os.environ["SAMPLES_LOG"]) / f"{lives}.jsonl", "a", encoding="utf-8") as file:
        file.write(
            json.dumps(
                {
                    "at": time.time(),
                    "step": step,
                    "rank": int(os.environ.get("RANK", 0)),
                    "ranks": int(os.environ.get("WORLD_SIZE", 1)),
                    "ids": ids,
                }
            )
            + "\n"
        )
    end_step(self, step, lr)


MetricLogger.end_step = end_step_and_note
sys.exit(main())
