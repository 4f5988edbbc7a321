"""Tars that somebody else wrote, without our index: which they are, and what can still be promised. No torch here.

Without an index nothing is known of what the tars hold, so there is no exact order and no exact resume: `dmae-shards
index` writes one, reads every tar once, and gives both. Until then stream.py streams them, if `data.num_samples` says
how long an epoch is, which also makes clear that it is meant: an unfinished shard folder looks just like foreign tars.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.data.shards import MANIFEST, ShardError
from dmae_ds.data.storage import LISTED, Access, LocalFolder, RemoteFolder, is_url, open_folder

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


def find_unindexed(
    location: str, *, is_tars: bool, num_samples: int, shuffle_buffer: int, label: str, access: Access
) -> UnindexedShards:
    """The tars that a folder, a brace pattern or a `pipe:` URL names.

    is_tars: `location` names tars rather than a folder; num_samples: length of an epoch
    Raises ShardError, one line that begins with `label`.
    """
    tars = _find_tars(location, is_tars=is_tars, label=label, access=access)
    content = json.dumps(
        [[name if folder is None else folder.path(name), size] for folder, name, size in tars] + [num_samples]
    )
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return UnindexedShards(tars, num_samples, shuffle_buffer, fingerprint)


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
