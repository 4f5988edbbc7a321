"""Which GPU a rank uses: the one of its number on its node, or the only one it sees, and no other rank's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store


def choose_gpu(world: World, *, num_visible: int) -> int:
    """Index of this rank's GPU among the visible ones. Raises UserError where there is none for it.

    A rank that sees a single GPU takes it, whatever its number on the node: srun's --gpus-per-task shows each
    rank its own. `check_own_gpu` then refuses two ranks with the same one.
    """
    if num_visible == 1:
        if world.local_rank > 0:
            os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's index of the device
        return 0
    if world.local_rank >= num_visible:
        raise UserError(
            f"{world.name()} has no GPU of its own: {num_visible} here; start at most one rank for each GPU, "
            "and let every rank see all GPUs of its node, or its own alone"
        )
    return world.local_rank


def check_own_gpu(store: Store, world: World, *, uuid: str) -> None:
    """Raise UserError on the ranks of this node that use the same GPU. Collective.

    store: shared by all ranks
    """
    store.set(f"gpu/{world.rank}", uuid)
    first = world.rank - world.local_rank
    ranks = [rank for rank in range(first, first + world.local_size) if rank != world.rank]
    for rank in ranks:
        if store.get(f"gpu/{rank}").decode() == uuid:
            raise UserError(
                f"{world.name()} and rank {rank} use the same GPU ({uuid}); "
                "start at most one rank for each GPU"
            )
