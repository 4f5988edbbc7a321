"""Find the tars that TARS of `dmae-shards index` names: in a folder, by a URL, or in a bucket's folder."""

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.tars import REMOTE
from dmae_ds.data.refusals import describe, describe_refusal
from dmae_ds.data.shards import ShardError, is_shard_name

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)$")


def find_tars(tars: str) -> tuple[str, list[str]]:
    """Find the tars that TARS names; returns (base, names). Raises ShardError if there are none.

    Tar NAME is base/NAME; base is an absolute path or a URL.
    """
    if not REMOTE.match(tars):
        folder = Path(tars)
        if not folder.is_dir():
            raise ShardError(f"TARS '{tars}' is not a folder")
        base, names = str(folder.resolve()), sorted(path.name for path in folder.iterdir())
    elif tars.endswith(".tar"):
        base, _, pattern = tars.rpartition("/")
        names = list(_expand(pattern))
    else:
        base, names = tars.rstrip("/"), _list_remote(tars)
    compressed = [name for name in names if COMPRESSED.search(name)]
    names = [name for name in names if name.endswith(".tar")]
    left_out = ""
    if compressed:
        left_out = (
            f"{len(compressed):,} compressed tars cannot be read, first {compressed[0]}; unpack to .tar"
        )
    if not names:
        raise ShardError(f"TARS '{tars}' has no .tar files{left_out and '; ' + left_out}")
    if left_out:
        print(f"left out: {left_out}")
    bad = next((name for name in names if not is_shard_name(name)), None)
    if bad is not None:
        raise ShardError(
            f"TARS '{tars}': a shard cannot be named {bad!r}; expected a plain file name such as NAME.tar"
        )
    return base, names


def _list_remote(url: str) -> list[str]:
    """Sorted names of the files behind a URL. Raises ShardError."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        return sorted(item.rstrip("/").rpartition("/")[2] for item in system.ls(path, detail=False))
    except Exception as error:  # each file system has its own
        refusal = describe_refusal(error, url.partition("://")[0])
        way_out = refusal or f"{describe(error)}; try URL/NAME-{{000..146}}.tar"
        raise ShardError(f"TARS '{url}' cannot be listed: {way_out}") from None


def _expand(pattern: str) -> Iterator[str]:
    """Expand a range in braces: 'a-{08..11}.tar' -> a-08.tar, a-09.tar, ..."""
    match = re.fullmatch(r"(.*)\{([0-9]{1,9})\.\.([0-9]{1,9})\}(.*)", pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[2]), int(match[3]) + 1):
        yield f"{match[1]}{number:0{len(match[2])}d}{match[4]}"
