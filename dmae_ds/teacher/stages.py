"""How a teacher's blocks are cut into pipeline stages: pure numbers, no torch."""

from __future__ import annotations

from dmae_ds.errors import UserError


def split_blocks(num_blocks: int, num_stages: int) -> list[range]:
    """Contiguous stages of equal blocks, counted from 0; sizes differ by one at most, the longer ones first.

    Raises UserError unless every stage gets a block.
    """
    if not 1 <= num_stages <= num_blocks:
        raise UserError(f"{num_blocks} blocks can't be cut into {num_stages} stages; take 1 to {num_blocks}")
    size, longer = divmod(num_blocks, num_stages)
    starts = [stage * size + min(stage, longer) for stage in range(num_stages + 1)]
    return [range(first, last) for first, last in zip(starts, starts[1:])]
