"""The one rule by which train, plan, bench and finetune cut a global batch.

    global batch = world_size x micro_batch x accumulation

Every rank takes an equal share of the global batch, in `accumulation` micro-batches of `micro_batch` images.
A recipe's `optim.micro_batch` is an upper bound: the largest divisor of the share below it is taken, so that
a run can continue on another number of ranks. Two things limit the cut: images that must stay in one
micro-batch (repeated views of an image, images that are mixed), and objectives that compare all images of the
batch, which accumulate nothing.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

from dmae_ds.config.family import objectives_of
from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError


class BatchSplit(NamedTuple):
    """What a rank does in a step: `accumulation` micro-batches of `micro_batch` images."""

    micro_batch: int
    accumulation: int


def split_recipe(config: RunConfig, world_size: int, *, fitted: int | None = None) -> BatchSplit:
    """Cut a recipe's global batch for so many ranks.

    fitted: micro-batch of the checkpoint that is resumed; it bounds the cut where the recipe gives no
      `optim.micro_batch`
    Raises UserError where the batch can't be cut.
    """
    objectives, optim = objectives_of(config), config.optim
    for objective in objectives:
        if objective.mix_group_size > 1 and config.data.repeat > 1:
            raise UserError(
                f"objective {objective.name} mixes images that follow each other, and with data.repeat "
                f"{config.data.repeat} these are crops of one image; set data.repeat=1"
            )
    whole = whole_batch(config)
    bound = optim.micro_batch
    if bound is None and whole is None:
        bound = fitted
    split = split_batch(optim.global_batch, bound, world_size, group_size=group_size(config))
    if whole is not None and split.accumulation > 1:
        raise UserError(
            f"objective {whole} compares all images of a batch, but optim.micro_batch {bound} cuts "
            "each rank's "
            f"share of optim.global_batch {optim.global_batch} into {split.accumulation}; remove "
            "optim.micro_batch, "
            "or use more ranks or a smaller batch"
        )
    return split


def smaller_split(config: RunConfig, world_size: int, split: BatchSplit) -> BatchSplit | None:
    """The next cut with at most half as many images in a micro-batch; None where there is none."""
    if whole_batch(config) is not None or split.micro_batch < 2 * group_size(config):
        return None
    try:
        return split_batch(
            config.optim.global_batch, split.micro_batch // 2, world_size, group_size=group_size(config)
        )
    except UserError:
        return None


def group_size(config: RunConfig) -> int:
    """Number of consecutive images that stay in one micro-batch: crops of an image, or images to mix."""
    return lcm(config.data.repeat, *(objective.mix_group_size for objective in objectives_of(config)))


def whole_batch(config: RunConfig) -> str | None:
    """Name of an objective that compares all images of a batch; None where none does."""
    return next((objective.name for objective in objectives_of(config) if objective.needs_whole_batch), None)


def split_batch(
    global_batch: int, micro_batch: int | None, world_size: int, *, exact: bool = False, group_size: int = 1
) -> BatchSplit:
    """Cut a global batch into equal micro-batches.

    micro_batch: the most images that a rank takes at once; None: its whole share
    exact: take `micro_batch` itself or refuse, where it is part of the result (batch norm, mixing)
    group_size: number of consecutive images that stay in one micro-batch
    Raises UserError where the batch can't be cut like this.
    """
    if global_batch % world_size:
        fitting = " or ".join(str(number) for number in _nearest_divisors(global_batch, world_size))
        raise UserError(
            f"optim.global_batch {global_batch} is not divisible by {world_size} ranks; "
            f"start {fitting} ranks, or choose another optim.global_batch"
        )
    share = global_batch // world_size
    bound = min(micro_batch or share, share)
    sizes = [size for size in range(group_size, bound + 1, group_size) if share % size == 0]
    if not sizes:
        limit = f", at most optim.micro_batch {micro_batch} at once" if micro_batch else ""
        raise UserError(
            f"{group_size} images stay in one micro-batch (data.repeat, or images that are mixed), which "
            "does not "
            f"divide the {share} images of a rank's step{limit}; choose another optim.global_batch"
        )
    if exact and sizes[-1] != (micro_batch or share):
        raise UserError(
            f"optim.global_batch {global_batch} on {world_size} ranks is not divisible by optim.micro_batch "
            f"{micro_batch}; the next smaller one that fits is {sizes[-1]}"
        )
    return BatchSplit(sizes[-1], share // sizes[-1])


def _nearest_divisors(number: int, target: int) -> list[int]:
    """The two divisors of a number that are nearest to the target, in ascending order."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return sorted(sorted(divisors, key=lambda divisor: (abs(divisor - target), divisor))[:2])
