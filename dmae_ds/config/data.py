"""Schemas of a recipe's `data` section: shards, how they are read, and how many images are trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dmae_ds.config.objective_base import Section


class DataConfig(Section):
    """Shard folders written by `dmae-shards make`, how they are read, and the crops that are taken."""

    train: str  # a folder here or behind a URL
    val: str | None = None  # held-out images, for k-NN and accuracy; null: none are measured
    num_workers: NonNegativeInt = 8  # processes of each rank that decode images
    # Samples that are read at once. 1: an exact global shuffle; 16 or 64: for URLs and hard disks
    # (dmae_ds/data/order.py).
    block: Annotated[int, Field(ge=1, le=4096)] = 1
    # Crops of an image, each with its own mask, that are taken once it is decoded (repeated sampling, as MAE
    # for video). Epochs and steps count crops: with 4, an image is decoded in every fourth epoch.
    repeat: PositiveInt = 1
    buffer_gib: PositiveFloat = 8.0  # with block above 1: memory for blocks, for all workers of a rank
    # Corrupt samples that are replaced and recorded in RUN/corrupt.jsonl before the run stops; 0: stop at the
    # first. One bad image should not end a run of days, but a hundred mean a bad disk.
    max_corrupt: NonNegativeInt = 100
    retries: NonNegativeInt = 8  # of a request to a URL, after .1, .2, .4 ... 10 seconds
    timeout_s: PositiveFloat = 30.0  # of one request
    cache_dir: str | None = None  # a folder on a local disk for what was read from URLs
    cache_gib: PositiveFloat = 50.0  # its limit, for all processes of a node together
    # Samples of an epoch, for tars without an index, which are then streamed; `dmae-shards index` is better.
    num_samples: PositiveInt | None = None
    shuffle_buffer: PositiveInt = 5000  # samples, of each worker that streams
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)  # a crop's share of the image's area
    flip: bool = True  # mirror half of the crops
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: share of the short side, centred
    # Of pixels from 0 to 1, one number a channel; ImageNet's. `dmae-shards info DST --mean-std` has others.
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, ...] = (0.229, 0.224, 0.225)  # likewise
    # Bits of a pixel that reach the network. 16: of .npy arrays of 16 bits, in float32; 8: their upper byte.
    bits: Literal[8, 16] = 8

    @model_validator(mode="after")
    def _scale_is_a_range(self):
        low, high = self.crop_scale
        if not low <= high <= 1:
            raise ValueError(
                f"crop_scale [{low:g}, {high:g}] is not a range of area shares; give 0 < low <= high <= 1"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for name, needs, met in (
            ("buffer_gib", "data.block above 1", self.block > 1),
            ("cache_gib", "data.cache_dir", self.cache_dir is not None),
            ("shuffle_buffer", "data.num_samples", self.num_samples is not None),
        ):
            if getattr(self, name) != defaults[name] and not met:
                raise ValueError(f"data.{name} requires {needs}; set that too, or remove data.{name}")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"data.mean has {len(self.mean)} numbers and data.std {len(self.std)}; give one a channel"
            )
        if self.num_samples is not None and self.repeat > 1:
            raise ValueError(
                "data.repeat requires shards with an index, and data.num_samples is for tars without one; "
                "remove one of the two, or make an index with `dmae-shards index`"
            )
        return self


class TrainingDataConfig(DataConfig):
    """What a training run reads: the images, and how many of them."""

    # Share of data.train's images that are trained on. They are the same for every run.seed, and those of a
    # smaller share are among those of a larger one. Epochs count them; evaluations read all of data.train.
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _a_share_can_be_drawn(self):
        if self.share < 1 and self.num_samples is not None:
            raise ValueError(
                "data.share requires shards with an index, and data.num_samples is for tars without one; "
                "remove one of the two, or make an index with `dmae-shards index`"
            )
        if self.share < 1 and self.block > 1:
            raise ValueError(
                f"data.block {self.block} reads many consecutive samples for the few of data.share "
                f"{self.share:g}; set data.block=1"
            )
        return self
