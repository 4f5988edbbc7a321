"""Schemas of the recipes that train a dense task: `dmae-ds eval segment`; detection builds on their base.

Where a run folder is evaluated, its network, its pixel statistics and its seed are used unless the recipe
gives others. Defaults are MAE's published ones for UperNet on ViT-B and ADE20K (MAE, A.4, after BEiT).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dmae_ds.config.evaluation import WeightsConfig
from dmae_ds.config.objective_base import Section
from dmae_ds.config.run import Unit, check_channels


class DenseDataConfig(Section):
    """Shard folders with label maps or boxes, and how they are read (dmae_ds/data/dense.py)."""

    train: str  # a folder here or behind a URL
    val: str  # images that are not trained on, and that the scores are of
    num_workers: NonNegativeInt = 8  # processes of each rank that decode images
    retries: NonNegativeInt = 8  # of a request to a URL, after .1, .2, .4 ... 10 seconds
    timeout_s: PositiveFloat = 30.0  # of one request
    cache_dir: str | None = None  # a folder on a local disk for what was read from URLs
    cache_gib: PositiveFloat = 50.0  # its limit, for all processes of a node together
    # Of pixels from 0 to 1, one number a channel; ImageNet's.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)  # likewise

    @model_validator(mode="after")
    def _the_cache_is_used(self):
        if self.cache_dir is None and self.cache_gib != type(self).model_fields["cache_gib"].default:
            raise ValueError("data.cache_gib requires data.cache_dir; set that too, or remove data.cache_gib")
        return self


class DenseOptimConfig(Section):
    """AdamW with a rate for each layer of the ViT, the batch, and the schedule of the learning rate.

    `length`, `evaluate_every` and `save_every` are counted in `unit`, warm-up always in steps.
    """

    global_batch: PositiveInt = 16  # images of an optimizer step, over all ranks
    micro_batch: PositiveInt | None = None  # images of a rank at once; null: its share of the batch
    lr: PositiveFloat = 1e-4  # the peak, whatever the batch; of the head and, below it, times layer_decay
    min_lr: NonNegativeFloat = 0.0  # learning rate at the end, for poly and cosine
    unit: Literal["steps", "epochs"] = "steps"
    length: PositiveFloat = 160_000.0  # of the training
    evaluate_every: PositiveFloat = 16_000.0  # scores on data.val; the end is always scored
    save_every: PositiveFloat = 2_000.0  # state to continue from, and a line in metrics.jsonl
    warmup_steps: NonNegativeInt = 1500  # linear rise of the learning rate from 0
    # Fall after warm-up. poly: linear to min_lr; cosine: half a cosine; steps: times .1 at each milestone.
    decay: Literal["poly", "cosine", "steps"] = "poly"
    milestones: tuple[Unit, ...] = ()  # with decay steps: shares of the training, such as [0.667, 0.917]
    weight_decay: NonNegativeFloat = 0.05  # of matrices; biases and norms have none
    betas: tuple[Unit, Unit] = (0.9, 0.999)  # of Adam's moments
    # A block's learning rate divided by that of the block above it; the head is above the last block.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    clip_grad: NonNegativeFloat = 0.0  # limit of the global gradient norm; 0: no clipping

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        if (self.decay == "steps") != bool(self.milestones):
            raise ValueError(
                f"optim.decay {self.decay} does not go with optim.milestones {list(self.milestones)}; "
                "decay steps requires shares of the training, such as [0.667, 0.917], the others have none"
            )
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"optim.milestones {list(self.milestones)} do not rise; sort them")
        if self.decay == "steps" and self.min_lr:
            raise ValueError("optim.min_lr is for decay poly and cosine; remove it")
        return self


class DenseConfig(WeightsConfig):
    """Options of every dense task: the weights, the images, the training, and where the result goes."""

    data: DenseDataConfig
    optim: DenseOptimConfig = DenseOptimConfig()
    init: Literal["weights", "random"] = "weights"  # random: the same network from scratch
    drop_path: Unit = 0.1  # rate of the last block; rises linearly from 0 at the first
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay in fp32
    tf32: bool = True  # fp32 matrix products on GPUs in TF32; false: exact

    @model_validator(mode="after")
    def _channels_agree(self):
        if len(self.data.mean) != len(self.data.std):
            raise ValueError(
                f"data.mean has {len(self.data.mean)} numbers and data.std {len(self.data.std)}; give one a "
                "channel"
            )
        if len(self.data.mean) != 3:
            raise ValueError(
                f"data.mean has {len(self.data.mean)} numbers, and images of dense tasks have 3 channels, RGB"
            )
        check_channels(self.data, self.network, "network")
        return self
