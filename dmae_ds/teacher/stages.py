"""The blocks of a teacher that a pipeline stage runs, by the owner of the batch: pure numbers, no torch.

A frozen encoder's blocks cost the same, but their number rarely divides by the stages: nine blocks in two
stages are 5 and 4, and the second stage would wait for the first. So the border between two stages depends on
the batch's owner. Of nine blocks, stage 0 runs 1-4 for owner 0 and 1-5 for owner 1, and stage 1 the rest;
both hold block 5, and on every pipeline tick both run nine blocks.

    border of stage s for owner o:  floor((s * num_blocks + o) / num_stages)

Over the owners these floors sum to s * num_blocks (Hermite's identity), so every stage runs exactly
`num_blocks` blocks a
tick: the balance is perfect for every depth, which no contiguous partition (such as DeepSpeed's
`partition_balanced`) can give. Where the blocks divide unevenly, a stage holds at most one block more than
the shortest stage of an even cut.
"""

from __future__ import annotations

from itertools import pairwise

from dmae_ds.errors import UserError


def route(num_blocks: int, num_stages: int, owner: int) -> list[range]:
    """The blocks, counted from 0, that each stage runs for the batches of one owner (0 to num_stages - 1).

    Together the stages run every block once. Raises UserError unless every stage gets a block.
    """
    if not 1 <= num_stages <= num_blocks:
        raise UserError(
            f"{num_blocks} blocks can't be cut into {num_stages} stages; set teacher.stages to 1-{num_blocks}"
        )
    borders = [(stage * num_blocks + owner) // num_stages for stage in range(num_stages + 1)]
    return [range(first, last) for first, last in pairwise(borders)]


def held_blocks(num_blocks: int, num_stages: int) -> list[range]:
    """The blocks that each stage holds, for all owners together; neighbouring stages may share one.

    Raises UserError like `route`.
    """
    first, last = route(num_blocks, num_stages, 0), route(num_blocks, num_stages, num_stages - 1)
    return [range(one.start, other.stop) for one, other in zip(first, last, strict=True)]
