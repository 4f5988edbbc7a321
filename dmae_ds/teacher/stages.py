"""Which of a teacher's blocks a pipeline stage runs, and for whom: pure numbers, no torch.

A frozen encoder's blocks cost the same, but their number rarely divides by the stages: nine blocks in two stages are 5
and 4, and everybody waits for the five. So the border between two stages differs by the batch's owner. Of nine blocks,
stage 0 runs 1-4 for owner 0 and 1-5 for owner 1, stage 1 the rest; both hold block 5, and at every clock both run nine.

    border of stage s for owner o:  floor((s * num_blocks + o) / num_stages)

Over the owners these floors sum to s * num_blocks (Hermite's identity), so every stage runs exactly `num_blocks` blocks a
clock: the balance is perfect for every depth, which no contiguous partition (DeepSpeed's `partition_balanced` for one)
can give. A stage holds one block more than the shortest of an even cut at most where blocks divide unevenly, and none
more where they divide.
"""

from __future__ import annotations

from dmae_ds.errors import UserError


def route(num_blocks: int, num_stages: int, owner: int) -> list[range]:
    """The blocks, counted from 0, that each stage runs for the batches of one owner (0 to num_stages - 1): all, once.

    Raises UserError unless every stage gets a block.
    """
    if not 1 <= num_stages <= num_blocks:
        raise UserError(
            f"{num_blocks} blocks can't be cut into {num_stages} stages; set teacher.stages to 1-{num_blocks}"
        )
    borders = [(stage * num_blocks + owner) // num_stages for stage in range(num_stages + 1)]
    return [range(first, last) for first, last in zip(borders, borders[1:])]


def held_blocks(num_blocks: int, num_stages: int) -> list[range]:
    """The blocks that each stage holds, for all owners together; neighbours may share one. Raises UserError as `route`."""
    first, last = route(num_blocks, num_stages, 0), route(num_blocks, num_stages, num_stages - 1)
    return [range(one.start, other.stop) for one, other in zip(first, last)]
