"""Unindexed tars: which tars a location names, and what is guaranteed about their order. Without torch.

Without an index the content of the tars is unknown, so there is no exact order and no exact resume:
`dmae-shards index` reads every tar once and writes an index, which gives both. Until then unindexed_stream.py
streams the tars, if `data.num_samples` sets the length of an epoch. The key also shows that streaming is
intended: an unfinished shard folder looks just like unindexed tars.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.data.shards import MANIFEST, ShardError
from dmae_ds.data.storage import LISTED, Access, LocalFolder, RemoteFolder, is_url, open_folder

ORDER_GUARANTEE = (
    "streamed without an index: every rank has the same number of batches, but a sample may come twice in an "
    "epoch or not at all, batches depend on ranks and workers, and resuming starts a new shuffle; "
    "`dmae-shards index` gives an exact order"
)


@dataclass(frozen=True)
class UnindexedShards:
    """Tars to be streamed, with the fields of a ShardSet that training and checkpoints use."""

    tars: list[tuple[LocalFolder | RemoteFolder | None, str, int]]  # (folder, name, bytes); None: a pipe: URL
    num_samples: int  # data.num_samples, the length of an epoch
    shuffle_buffer: int
    fingerprint: str
    classes: tuple[str, ...] = ()
    order_guarantee: str = ORDER_GUARANTEE


def find_unindexed(
    location: str, *, is_tars: bool, num_samples: int, shuffle_buffer: int, label: str, access: Access
) -> UnindexedShards:
    """Find the tars that a folder, a brace pattern or a `pipe:` URL names.

    is_tars: `location` names tars rather than a folder; num_samples: length of an epoch
    Raises ShardError whose message begins with `label`.
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
                f"{label} '{location}' is not a brace pattern ({error}); expected e.g. "
                f"shard-{{000000..000099}}.tar"
            ) from None
        if location.startswith("pipe:"):
            return [(None, path, 0) for path in paths]
        parents = {path.rpartition("/")[0] for path in paths}
        if len(parents) != 1:
            raise ShardError(
                f"{label} '{location}' names tars in {len(parents)} folders; give tars of one folder"
            )
        parent = parents.pop() or ("/" if location.startswith("/") else ".")
        folder = open_folder(parent, access=access, label=label)
        names = [path.rpartition("/")[2] for path in paths]
    if wrong := [name for name in names if not name.endswith(".tar")]:
        raise ShardError(f"{label} '{location}': {wrong[0]} is not a .tar; compressed tars are not streamed")
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
            f"{label} '{location}': {missing[0]} was not found ({len(missing)} of {len(names)} tars are "
            f"missing)"
        )
    return [(folder, name, sizes[name]) for name in names]


def _list_tars(folder: LocalFolder | RemoteFolder, location: str, label: str) -> list[str]:
    if is_url(location) and location.partition("://")[0] not in LISTED:
        raise ShardError(
            f"{label} '{location}': a web server does not list its files; give a pattern such as "
            f"{location}/shard-{{000000..000099}}.tar"
        )
    try:
        names = sorted(name for name in folder.names() if name.endswith(".tar"))
    except OSError as error:
        raise ShardError(f"{label} '{location}' cannot be read: {error.strerror}") from None
    if not names:
        raise ShardError(
            f"{label} '{location}' contains no .tar files; make shards with `dmae-shards make SRC "
            f"{Path(location)}`"
        )
    return names
