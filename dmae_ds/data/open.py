"""Open data.train: a shard folder, or tars without an index. Without torch."""

from __future__ import annotations

from dmae_ds.config.data import DataConfig
from dmae_ds.data.arrays import channels_in
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import MANIFEST, ShardError
from dmae_ds.data.storage import Access, is_url
from dmae_ds.data.unindexed import UnindexedShards, find_unindexed


def open_train(data: DataConfig, *, allow_pipe: bool) -> ShardSet | UnindexedShards:
    """Open the shard folder that data.train names, or unindexed tars if data.num_samples is set.

    Raises ShardError.
    """
    location, label, access = data.train, "data.train", Access.of(data)
    if location.startswith("pipe:") and not allow_pipe:
        raise ShardError(f"{label} '{location}' runs a shell command; add --allow-pipe if you trust it")
    is_tars = location.startswith("pipe:") or location.endswith(".tar") or "{" in location
    if data.num_samples is None:
        if is_tars:
            raise ShardError(
                f"{label} '{location}' names tars; give a folder with {MANIFEST} (`dmae-shards index` writes "
                f"one for any tars), or set data.num_samples, the length of an epoch, to stream them without "
                f"an exact order"
            )
        shard_set = ShardSet.open(location, label=label, access=access)
        if data.cache_dir is not None and not shard_set.tars.is_remote and not is_url(data.val or ""):
            raise ShardError(
                f"data.cache_dir '{data.cache_dir}' requires a URL, and {label} '{location}' is a local "
                f"folder; remove data.cache_dir"
            )
        check_channels(shard_set, data, label=label)
        return shard_set
    if data.block > 1:
        raise ShardError(
            f"data.block {data.block} requires an index, and {label} '{location}' has none; remove "
            f"data.block, or run `dmae-shards index`"
        )
    return find_unindexed(
        location,
        is_tars=is_tars,
        num_samples=data.num_samples,
        shuffle_buffer=data.shuffle_buffer,
        label=label,
        access=access,
    )


def check_channels(shard_set: ShardSet, data: DataConfig, *, label: str) -> None:
    """Raise ShardError for a set of arrays with another number of channels than data.mean has numbers."""
    channels = channels_in(shard_set.images)
    if channels is not None and channels != len(data.mean):
        raise ShardError(
            f"{label} '{shard_set.folder}' holds {shard_set.images}, and data.mean has "
            f"{len(data.mean)} numbers, one a channel; set student.in_chans={channels}, and data.mean and "
            "data.std as `dmae-shards info DST --mean-std` prints them"
        )
