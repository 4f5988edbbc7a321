"""Tars that somebody else wrote, without our index: which they are, and what can still be promised. No torch here.

Without an index nothing is known of what the tars hold, so there is no exact order and no exact resume: `dmae-shards
index` writes one, reads every tar once, and gives both. Until then stream.py streams them, if `data.num_samples` says
how long an epoch is, which also makes clear that it is meant: an unfinished shard folder looks just like foreign tars.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import MANIFEST, ShardError
from dmae_ds.data.storage import LISTED, Access, LocalFolder, RemoteFolder, is_url, open_folder

if TYPE_CHECKING:
    from dmae_ds.config.run import DataConfig

ORDER_GUARANTEE = (
    "streamed without an index: batches are as many on every rank, but a sample may come twice in an epoch or not at all, "
    "batches depend on ranks and workers, and resuming starts a new shuffle; `dmae-shards index` gives an exact order"
)


@dataclass(frozen=True)
class UnindexedShards:
    """Tars to be streamed. What `train_batches` and a checkpoint's identity need of a ShardSet, this has too."""

    tars: list[
        tuple[LocalFolder | RemoteFolder | None, str, int]
    ]  # (folder, name, bytes); None: the name is a pipe: URL
    num_samples: int  # an epoch's, as the recipe says
    shuffle_buffer: int
    fingerprint: str
    classes: tuple[str, ...] = ()
    order_guarantee: str = ORDER_GUARANTEE


def open_train(data: "DataConfig", *, allow_pipe: bool) -> ShardSet | UnindexedShards:
    """What data.train names: a shard folder, or foreign tars if data.num_samples is set. Raises ShardError, one line."""
    location, label, access = data.train, "data.train", Access.of(data)
    if location.startswith("pipe:") and not allow_pipe:
        raise ShardError(
            f"{label} '{location}' runs a command of the shell; start with --allow-pipe if it is yours"
        )
    is_tars = location.startswith("pipe:") or location.endswith(".tar") or "{" in location
    if data.num_samples is None:
        if is_tars:
            raise ShardError(
                f"{label} '{location}' names tars; give a folder with {MANIFEST} (`dmae-shards index` writes one for tars of "
                f"any origin), or data.num_samples, an epoch's length, to stream them without an exact order"
            )
        shard_set = ShardSet.open(location, label=label, access=access)
        if data.cache_dir is not None and not shard_set.tars.is_remote and not is_url(data.val or ""):
            raise ShardError(
                f"data.cache_dir '{data.cache_dir}' is of no use to '{location}', which is no URL; remove it"
            )
        return shard_set
    tars = _find_tars(location, is_tars=is_tars, label=label, access=access)
    if data.block > 1:
        raise ShardError(
            f"data.block {data.block} is of no use to tars without an index; remove it, or run `dmae-shards index`"
        )
    content = json.dumps(
        [[name if folder is None else folder.path(name), size] for folder, name, size in tars]
        + [data.num_samples]
    )
    return UnindexedShards(
        tars, data.num_samples, data.shuffle_buffer, hashlib.sha256(content.encode()).hexdigest()
    )


def _find_tars(
    location: str, *, is_tars: bool, label: str, access: Access
) -> list[tuple[LocalFolder | RemoteFolder | None, str, int]]:
    from braceexpand import braceexpand

    if not is_tars:
        folder = open_folder(location, access=access, label=label)
        names = _list_tars(folder, location, label)
    else:
        try:
            paths = list(braceexpand(location))
        except ValueError as error:
            raise ShardError(
                f"{label} '{location}' is no brace pattern ({error}); write shard-{{000000..000099}}.tar"
            ) from None
        if location.startswith("pipe:"):
            return [(None, path, 0) for path in paths]
        parents = {path.rpartition("/")[0] for path in paths}
        if len(parents) != 1:
            raise ShardError(
                f"{label} '{location}' names tars of {len(parents)} folders; give tars of one folder"
            )
        folder = open_folder(
            parents.pop() or ("/" if location.startswith("/") else "."), access=access, label=label
        )
        names = [path.rpartition("/")[2] for path in paths]
    if wrong := [name for name in names if not name.endswith(".tar")]:
        raise ShardError(f"{label} '{location}': {wrong[0]} is no .tar; compressed tars are not streamed")
    try:
        sizes = folder.sizes([*names, MANIFEST])
    except OSError as error:
        raise ShardError(f"{label} '{location}' cannot be read: {error.strerror}") from None
    if MANIFEST in sizes:
        raise ShardError(
            f"{label} '{location}' has an index ({MANIFEST}); name its folder and remove data.num_samples"
        )
    if missing := [name for name in names if name not in sizes]:
        raise ShardError(
            f"{label} '{location}': {missing[0]} is not there ({len(missing)} of {len(names)} are missing)"
        )
    return [(folder, name, sizes[name]) for name in names]


def _list_tars(folder: LocalFolder | RemoteFolder, location: str, label: str) -> list[str]:
    if is_url(location) and location.partition("://")[0] not in LISTED:
        raise ShardError(
            f"{label} '{location}': a web server does not list its files; write a pattern such as {location}/shard-{{000000..000099}}.tar"
        )
    try:
        names = sorted(name for name in folder.names() if name.endswith(".tar"))
    except OSError as error:
        raise ShardError(f"{label} '{location}' cannot be read: {error.strerror}") from None
    if not names:
        raise ShardError(
            f"{label} '{location}' holds no .tar files; make shards with `dmae-shards make SRC {Path(location)}`"
        )
    return names
