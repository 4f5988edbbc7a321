"""Checks of stored features before a run, in a fraction of a second and without torch."""

from __future__ import annotations

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import LISTED, Access, is_url
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.errors import UserError
from dmae_ds.teacher.cache_file import LABEL, open_cache
from dmae_ds.teacher.cache_manifest import (
    Manifest,
    check_same,
    read_manifest,
    recipe_identity,
    weights_identity,
)


def check_stored(config: RunConfig, shards: ShardSet | UnindexedShards, *, num_steps: int) -> int | None:
    """Check the caches that a recipe reads: whole, and of this data, order, crops, masks and teacher.

    Returns the number of steps after which they come again, where the run has more; else None. Raises
    UserError.
    """
    lengths = [
        check_cache(config, teacher, shards)
        for teacher in config.named_teachers().values()
        if teacher.placement == "cache"
    ]
    shortest = min(lengths, default=num_steps)
    return shortest if shortest < num_steps else None


def check_cache(config: RunConfig, teacher: TeacherConfig, shards: ShardSet | UnindexedShards) -> int:
    """Check the cache of one teacher; returns the number of its steps. Raises UserError."""
    location, access = teacher.cache, Access.of(config.data)
    where = f"{teacher.key('cache')} '{location}'"
    identity = recipe_identity(config, teacher, shards)
    manifest = open_manifest(location, access=access)
    if not manifest.is_complete:
        raise UserError(
            f"{where} is not complete; run the same dmae-ds teacher cache command again, which continues it"
        )
    check_same(manifest.recipe, identity, where=where)
    weights = weights_identity(teacher)
    if weights:  # the file may be absent, for it is not read
        check_same(manifest.weights, weights, where=where)
    check_files(manifest, location, access=access)
    return manifest.layout.num_steps


def open_manifest(location: str, *, access: Access) -> Manifest:
    """Read a cache's manifest. Raises UserError, also where there is none."""
    try:
        return read_manifest(location, access=access)
    except FileNotFoundError:
        raise UserError(
            f"{LABEL} '{location}' is not a cache of features; make it with: dmae-ds teacher cache RECIPE "
            f"{location}"
        ) from None


def check_files(manifest: Manifest, location: str, *, access: Access) -> None:
    """Raise UserError where a file is missing or has another size.

    Servers that cannot list a folder are not asked about each file.
    """
    if is_url(location) and location.partition("://")[0] not in LISTED:
        return
    expected = manifest.layout.sizes(manifest.layout.first_steps())
    found = open_cache(location, access=access).sizes(expected)
    for name, size in expected.items():
        if found.get(name) != size:
            state = f"has {found[name]:,} bytes" if name in found else "is missing"
            raise UserError(
                f"{LABEL} '{location}': {name} {state}, expected {size:,}; copy it again, or run the same "
                "dmae-ds teacher cache command, which writes it again"
            )
