"""A recipe with its batch cut for the ranks, and the DeepSpeed config that goes with the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from dmae_ds.config.batch import BatchSplit, split_recipe
from dmae_ds.config.deepspeed import load_deepspeed
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed.world import World

Cut = TypeVar("Cut", bound="CutRecipe")


@dataclass(frozen=True)
class CutRecipe:
    """A recipe, the ranks that take it, and how its batch is divided among them."""

    config: RunConfig
    world: World
    deepspeed: dict
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, config: RunConfig, world: World) -> CutRecipe:
        """Cut a recipe's batch as a new run does. Raises UserError where it can't be cut."""
        split = split_recipe(config, world.size)
        return CutRecipe(config, world, deepspeed_of(config, split, world), *split)

    @property
    def split(self) -> BatchSplit:
        """How a rank's share of the batch is cut."""
        return BatchSplit(self.micro_batch, self.accumulation)

    @property
    def is_resumed(self) -> bool:
        """Whether a checkpoint has decided the cut already."""
        return False

    def with_split(self: Cut, split: BatchSplit) -> Cut:
        """Cut the batch in another way, and record it in the recipe. Raises UserError where it can't be."""
        optim = self.config.optim.model_copy(update={"micro_batch": split.micro_batch})
        config = self.config.model_copy(update={"optim": optim})
        return replace(
            self,
            config=config,
            deepspeed=deepspeed_of(config, split, self.world),
            micro_batch=split.micro_batch,
            accumulation=split.accumulation,
        )


def deepspeed_of(config: RunConfig, split: BatchSplit, world: World) -> dict:
    """Load the DeepSpeed config of a recipe for a cut of its batch. Raises UserError."""
    return load_deepspeed(
        config.deepspeed,
        micro_batch=split.micro_batch,
        accumulation=split.accumulation,
        world_size=world.size,
        clip_grad=config.optim.clip_grad,
        precision=config.precision,
    )
