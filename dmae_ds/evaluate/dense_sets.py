"""The two sets of `dmae-ds eval dense`: shards with label maps, found and checked without torch."""

from __future__ import annotations

from dmae_ds.config.data import DataConfig
from dmae_ds.config.run import EvalConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.evaluate.subsets import first_difference


def open_maps(
    train: str, val: str | None, data: DataConfig, *, keys: tuple[str, str] = ("data.train", "data.val")
) -> tuple[ShardSet, ShardSet]:
    """Open two sets with label maps of the same classes.

    data: how they are read; keys: their names in messages
    Raises UserError for a missing set, one without label maps, other classes, or pixels that are not RGB.
    """
    if val is None:
        raise UserError(
            f"{keys[1]} is null, but dense tasks require images with label maps that were not trained on; "
            f"give {keys[1]}=SHARDS"
        )
    if len(data.mean) != 3 or data.bits != 8:
        raise UserError(
            f"dense tasks read 8-bit RGB, and data has {len(data.mean)} channels of {data.bits} bits"
        )
    sets = []
    for key, folder in zip(keys, (train, val), strict=True):
        shard_set = ShardSet.open(folder, label=key, access=Access.of(data))
        if shard_set.dense is None or shard_set.dense.map_classes is None:
            raise UserError(
                f"{key} '{folder}' has no label maps, which dense tasks require; make shards with "
                "`dmae-shards make IMAGES SHARDS --masks DIR`, and give them by "
                f"{keys[0]}=SHARDS {keys[1]}=SHARDS"
            )
        sets.append(shard_set)
    classes = [shard_set.dense.map_classes for shard_set in sets]
    if classes[0] != classes[1]:
        raise UserError(
            f"{keys[0]} and {keys[1]} have label maps of different classes ({len(classes[0])} and "
            f"{len(classes[1])} of them): {first_difference(*classes)}; make both with the same classes"
        )
    return tuple(sets)


def open_dense_sets(config: EvalConfig, data: DataConfig) -> tuple[ShardSet, ShardSet]:
    """The two sets of `eval.dense_every`: eval.dense_train and eval.dense_val, or those of the run.

    Raises UserError as `open_maps` does.
    """
    pairs = (
        ("eval.dense_train", config.dense_train, "data.train", data.train),
        ("eval.dense_val", config.dense_val, "data.val", data.val),
    )
    named = [(key, own) if own is not None else (run_key, of_run) for key, own, run_key, of_run in pairs]
    (train_key, train), (val_key, val) = named
    try:
        return open_maps(train, val, data, keys=(train_key, val_key))
    except UserError as error:
        raise UserError(f"eval.dense_every {config.dense_every:g}: {error}") from None
