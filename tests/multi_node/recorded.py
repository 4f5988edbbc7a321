"""`dmae_ds` for launchers; each rank also records the samples that it trained on.

deepspeed ... --module tests.multi_node.recorded train ...     writes RUN/seen/rank0.jsonl, rank1.jsonl, ...
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

from dmae_ds.cli.main import main
from dmae_ds.train.metrics import MetricLogger


def record_samples() -> None:
    """Make every MetricLogger also write a line for each micro-batch: its step, and its sample ids."""
    add, rank = MetricLogger.add, os.environ.get("RANK", "0")

    def add_and_record(self, scalars, sample_ids):
        path = self.path.parent / "seen" / f"rank{rank}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps({"step": self.step + 1, "ids": sample_ids.tolist()}) + "\n")
        add(self, scalars, sample_ids)

    MetricLogger.add = add_and_record


def batches(run_dir: Path) -> dict[int, list[int]]:
    """Sorted sample ids of each step's global batch, over all ranks and micro-batches."""
    ids_of_step = defaultdict(list)
    for path in (run_dir / "seen").glob("rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            ids_of_step[line["step"]] += line["ids"]
    return {step: sorted(ids) for step, ids in ids_of_step.items()}


if __name__ == "__main__":
    record_samples()
    sys.exit(main())
