"""Errors that every rank meets alike, so that one rank prints them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator

from dmae_ds.errors import UserError

if TYPE_CHECKING:
    from dmae_ds.distributed.world import World


@contextmanager
def same_on_every_rank() -> Iterator[World]:
    """Give this process's World; a UserError in the block is marked as raised on every rank, unless
    it is marked as one rank's alone (an image that only it reads).

    For checks of what all ranks share: the recipe, the run folder, the shards.
    """
    from dmae_ds.distributed.world import world_from_env

    try:
        yield world_from_env()
    except UserError as error:
        error.on_every_rank = not error.of_one_rank
        raise


def share_cpus(world: World) -> None:
    """Let accelerate join ranks on CPUs: unless it is told that there are no GPUs, each rank works alone."""
    import torch

    if world.size > 1 and not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
