"""Where `make` leaves a shard folder: a folder of this machine, or a bucket behind a URL.

A set for a bucket is made in a staging folder, which holds the journal. A shard is uploaded when it is on the
disk, then its tar is removed there, so that the staging folder stays small; the journal names it after that.
An upload appears whole or not at all, and the manifest is the last one. Two machines must not write one URL.
"""

import functools
import hashlib
import json
from pathlib import Path

from dmae_ds.data.shard_set import MANIFEST_BYTES
from dmae_ds.data.shards import JOURNAL, MANIFEST, SHARD_NAME, ShardError, is_file_of_set, list_files
from dmae_ds.data.storage import Access, RemoteFolder

WRITABLE = ("s3", "gs")


class OtherSetError(ShardError):
    """DST holds shards of other files or options than those that are asked for."""


class LocalTarget:
    """A shard folder of this machine."""

    url = None

    def __init__(self, folder: Path):
        self.folder, self.shown = folder, str(folder)

    def names(self) -> list[str]:
        """Names of the files of a shard set there, the manifest first."""
        return [path.name for path in list_files(self.folder) if path.name != JOURNAL]

    def read(self, name: str) -> bytes:
        """Content of a small file."""
        return (self.folder / name).read_bytes()

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink()

    def publish(self, name: str) -> None:
        """Do nothing: the file is where it should be."""

    def clear(self) -> None:
        """Do nothing: there is no staging folder."""


class BucketTarget:
    """A shard folder in a bucket, and the staging folder that its files are made in."""

    def __init__(self, url: str, folder: Path):
        self.folder, self.shown, self.url = folder, url, url

    @property
    def bucket(self) -> RemoteFolder:
        return open_bucket(self.url)

    def names(self) -> list[str]:
        """Names of the files of a shard set in the bucket, the manifest first. Raises ShardError."""
        try:
            names = [name for name in self.bucket.names() if is_file_of_set(name)]
        except FileNotFoundError:  # a bucket has no empty folders
            return []
        return sorted(names, key=lambda name: (name != MANIFEST, name))

    def read(self, name: str) -> bytes:
        """Content of a small file. Raises ShardError."""
        return self.bucket.read_all(name, limit=MANIFEST_BYTES)

    def remove(self, name: str) -> None:
        """Remove a file from the bucket. Raises ShardError."""
        self.bucket.remove(name)

    def publish(self, name: str) -> None:
        """Upload a file of the staging folder, or remove the bucket's where there is none."""
        if (self.folder / name).exists():
            self.bucket.put(self.folder / name)
        else:
            self.bucket.remove(name)

    def clear(self) -> None:
        """Remove the staging folder's files, which are uploaded."""
        for path in list_files(self.folder):
            path.unlink()


@functools.cache
def open_bucket(url: str) -> RemoteFolder:
    """The bucket's folder, opened once in each process. Raises ShardError."""
    return RemoteFolder(url, access=Access(), label="DST")


def find_target(dst: Path | str, staging: Path | None) -> LocalTarget | BucketTarget:
    """The target that DST names. Raises ShardError for a URL that can't be written, and for --staging alone.

    staging: None: for a URL, a folder named after it in the working folder
    """
    if isinstance(dst, Path):
        if staging is not None:
            raise ShardError("--staging requires a DST that is a URL; remove --staging")
        return LocalTarget(dst)
    url = dst.rstrip("/")
    scheme, _, rest = url.partition("://")
    if scheme not in WRITABLE:
        raise ShardError(
            f"DST '{dst}': shards can be written to a folder, {'://, '.join(WRITABLE)}://; make them in a "
            f"folder, and copy it there"
        )
    if "/" not in rest:
        raise ShardError(f"DST '{dst}' is a whole bucket; give a folder in it, such as {url}/train")
    if staging is None:
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        staging = Path(f"{url.rpartition('/')[2]}-{digest}.staging")
    return BucketTarget(url, staging)


def find_finished(target: LocalTarget | BucketTarget, plan: dict, old_plan: dict | None) -> bool:
    """Whether the target holds the set of `plan`.

    old_plan: that of the journal, if there is one
    Raises ShardError if the target holds another set.
    """
    old = target.names()
    is_finished = MANIFEST in old
    if is_finished:
        state, old_plan = "a finished shard set", _read_made(target)
    elif old_plan is not None:
        state = "an unfinished shard set"
    elif any(SHARD_NAME.fullmatch(name) for name in old):
        where = target.shown if target.url is None else f"the staging folder '{target.folder}'"
        raise ShardError(
            f"DST '{target.shown}' holds files of a shard set ({old[0]}) but {where} has no {JOURNAL}; "
            f"add --overwrite to replace it"
        )
    else:
        return False
    for key in ("dense", *plan):  # a plan of images alone does not have the first
        if old_plan.get(key) != plan.get(key):
            difference = f"{key}: found {old_plan.get(key)!r}, requested {plan.get(key)!r}"
            if key == "dense":
                difference = "dense: other maps, boxes or classes, or none"
            if key in ("num_sources", "listing_sha256"):
                difference = "the files of SRC or their labels changed"
            raise OtherSetError(
                f"DST '{target.shown}' holds {state} that was made differently ({difference}); use the same "
                f"options, or add --overwrite to replace it"
            )
    return is_finished


def _read_made(target: LocalTarget | BucketTarget) -> dict:
    """The plan in a manifest; empty if it cannot be read."""
    try:
        return dict(json.loads(target.read(MANIFEST))["made"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
