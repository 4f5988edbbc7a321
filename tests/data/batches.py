"""Training batches for the tests of this room: short calls of `train_batches`, and joined global batches."""

import os
from collections.abc import Iterator

import torch

from dmae_ds.data.batch import Batch
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.loader import train_batches

GLOBAL_BATCH = 8
NUM_STEPS = 7  # 56 samples: two epochs of 23 and a part of the third
LOADER_OPTIONS = ("buffer_gib", "max_corrupt", "corrupt_log")


def train(
    shard_set,
    *,
    start_step: int = 0,
    stop_step: int = NUM_STEPS,
    num_workers: int = 0,
    **changes,
) -> Iterator[Batch]:
    """`train_batches` of small images; `changes` are fields of BatchSpec, or LOADER_OPTIONS."""
    options = {name: changes.pop(name) for name in LOADER_OPTIONS if name in changes}
    settings = {
        "img_size": 16,
        "num_patches": 4,
        "crop_scale": (0.2, 1.0),
        "flip": True,
        "seed": 5,
        "global_batch": GLOBAL_BATCH,
        **changes,
    }
    num_micro_batches = settings.get("world_size", 1) * settings.get("accumulation", 1)
    settings.setdefault("micro_batch", settings["global_batch"] // num_micro_batches)
    return train_batches(
        shard_set,
        BatchSpec(**settings),
        start_step=start_step,
        stop_step=stop_step,
        num_workers=num_workers,
        pin_memory=False,
        **options,
    )


def join(batches) -> list[torch.Tensor]:
    """Images, noise, labels, sample ids and epochs of several batches, one tensor each."""
    fields = [(b.images, b.noise, b.labels, b.sample_ids, b.epochs) for b in batches]
    return [torch.cat(values) for values in zip(*fields, strict=True)]


def global_batches(
    shard_set, *, world_size: int = 1, accumulation: int = 1, **settings
) -> list[list[torch.Tensor]]:
    """Global batches, joined from the micro-batches of all ranks: the fields of `join` for each step."""
    ranks = [
        list(train(shard_set, world_size=world_size, rank=rank, accumulation=accumulation, **settings))
        for rank in range(world_size)
    ]
    steps = range(0, len(ranks[0]), accumulation)
    return [join(batch for rank in ranks for batch in rank[step : step + accumulation]) for step in steps]


def assert_same(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> None:
    """Both sequences of global batches are equal bit for bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def damage(shard_set, *sample_ids: int) -> None:
    """Invert one byte of each sample, inside its image."""
    for sample_id in sample_ids:
        shard, row = shard_set.locate(sample_id)
        with open(shard_set.folder / shard_set.shards[shard].name, "r+b") as file:
            file.seek(int(shard_set.open_index(shard)[row]["offset"]) + 40)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 255]))
