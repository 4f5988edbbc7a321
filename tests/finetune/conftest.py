"""Run folders with random students on small tinted images, and `dmae-ds eval finetune` in this process."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.finetune.run import evaluate
from tests.evaluate.conftest import on_the_cpu, run, shards

__all__ = ["on_the_cpu", "run", "shards"]  # fixtures

# Two epochs of three steps on 20 images, with everything random switched on.
QUICK = [
    "optim.global_batch=8",
    "optim.base_lr=0.2",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "data.num_workers=0",
    "drop_path=0.3",
]
PLAIN = ["augment.rand_augment=null", "augment.erase=0", "augment.mixup=0", "augment.cutmix=0", "drop_path=0"]


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, so that sums do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def finetune(weights, *overrides, recipe="finetune_mae", **options):
    """Run `dmae-ds eval finetune` in this process. Returns the line of results.jsonl."""
    return evaluate("finetune", str(weights), recipe=recipe, overrides=[*QUICK, *overrides], **options)
