"""Folders of files, local or behind a URL, that are read by position.

A local folder (also NFS, Lustre, a mounted bucket) is read by `pread`; `http(s)://`, `s3://`, `gs://` and
`hf://` by byte ranges through fsspec, with a time limit, retries that back off, and an optional cache on a
local disk (cache.py). Without torch; fsspec is imported only when a URL is opened.
"""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from dmae_ds.data.cache import ChunkCache, make_cache
from dmae_ds.data.refusals import describe, describe_refusal
from dmae_ds.data.shards import ShardError

if TYPE_CHECKING:
    from dmae_ds.config.data import DataConfig

# URL scheme -> the package that it requires besides fsspec
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
LISTED = ("s3", "gs", "hf")  # schemes in which one listing gives the sizes of a whole folder
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
SLOWEST_BYTES_PER_S = 2**19  # of an upload
NUM_THREADS = 16  # parallel requests of one process

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """How URLs are read; local folders do not use it."""

    retries: int = 8
    timeout_s: float = 30.0
    cache_dir: Path | None = None
    cache_gib: float = 50.0

    @classmethod
    def of(cls, data: "DataConfig") -> "Access":
        """Settings of the data section of a recipe."""
        cache_dir = None if data.cache_dir is None else Path(data.cache_dir).expanduser()
        return cls(
            retries=data.retries, timeout_s=data.timeout_s, cache_dir=cache_dir, cache_gib=data.cache_gib
        )


def is_url(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in str(location)


def open_folder(location: str | Path, *, access: Access, label: str) -> "LocalFolder | RemoteFolder":
    """Open a folder by its path or URL.

    label: the user's name for it, such as 'data.train'
    Raises ShardError for an unknown scheme, or one whose package is not installed.
    """
    if not is_url(location):
        return LocalFolder(Path(location))
    return RemoteFolder(str(location), access=access, label=label)


class LocalFolder:
    """A folder of the file system."""

    is_remote = False

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> str:
        """Path of a file."""
        return str(self.folder / name)

    def read_all(self, name: str, *, limit: int) -> bytes:
        """Read a small file. Raises OSError; FileNotFoundError if it does not exist."""
        with open(self.folder / name, "rb") as file:
            return file.read(limit)

    def names(self) -> list[str]:
        """Names of the files in the folder. Raises OSError."""
        return os.listdir(self.folder)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of the files that exist, by name. Raises OSError."""
        with os.scandir(self.folder) as entries:
            by_name = {entry.name: entry for entry in entries}
        return {name: by_name[name].stat().st_size for name in names if name in by_name}

    def open(self, name: str, *, size: int) -> "LocalFile":
        """Open a file for reading. Raises ShardError."""
        try:
            return LocalFile(os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC), self.path(name))
        except OSError as error:
            raise ShardError(f"{self.path(name)} cannot be opened: {error.strerror}") from None


class LocalFile:
    """A file by its descriptor, which is closed with the object.

    Forked workers may share it, since `pread` does not move a file position.
    """

    def __init__(self, descriptor: int, path: str):
        self.descriptor, self.path = descriptor, path

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes: fewer at the end of the file. Raises ShardError."""
        try:
            data = os.pread(self.descriptor, size, offset)
            while 0 < len(data) < size:  # a read of over 2 GiB, or a network file system
                more = os.pread(self.descriptor, size - len(data), offset + len(data))
                if not more:
                    break
                data += more
            return data
        except OSError as error:
            raise ShardError(f"{self.path} cannot be read: {error.strerror}") from None

    def forget(self, offset: int, size: int) -> bool:
        """Whether another read may give other bytes: never for a local file."""
        return False

    def __del__(self):
        os.close(self.descriptor)


class RemoteFolder:
    """A folder behind a URL; a worker that was forked or spawned opens its own connections."""

    is_remote = True

    def __init__(self, url: str, *, access: Access, label: str):
        self.url, self.access, self.label = url.rstrip("/"), access, label
        self.scheme = url.partition("://")[0]
        if self.scheme not in PACKAGES:
            raise ShardError(
                f"{label} '{url}': {self.scheme}:// is unknown; give a folder, or a URL of "
                f"{', '.join(PACKAGES)}"
            )
        self.cache: ChunkCache | None = None
        self._system: tuple[int, Any] | None = None  # (process, fsspec's file system)
        self.system()

    def __getstate__(self):
        return {**self.__dict__, "_system": None}

    def use_cache(self, fingerprint: str) -> None:
        """Keep the bytes that are read under access.cache_dir, if it is set."""
        if self.access.cache_dir is not None:
            self.cache = make_cache(
                self.access.cache_dir, fingerprint, limit_bytes=int(self.access.cache_gib * 2**30)
            )

    def path(self, name: str) -> str:
        """URL of a file."""
        return f"{self.url}/{quote(name) if self.scheme.startswith('http') else name}"

    def system(self) -> Any:
        """File system of fsspec, opened once in each process. Raises ShardError."""
        if self._system is None or self._system[0] != os.getpid():
            try:
                import fsspec

                system = fsspec.filesystem(self.scheme, skip_instance_cache=True)
            except ImportError as error:
                raise ShardError(
                    f"{self.label} '{self.url}': {self.scheme}:// requires {PACKAGES[self.scheme]} "
                    f"({error}); install dmae-ds[remote]"
                ) from None
            except Exception as error:  # such as a profile of AWS that does not exist
                refusal = describe_refusal(error, self.scheme)
                if refusal is None:
                    raise
                raise ShardError(f"{self.label} '{self.url}': {refusal}") from None
            logging.getLogger("fsspec").setLevel(logging.ERROR)
            if self.scheme == "s3":
                system.retries = 1  # its own retries do not respect our limits
            self._system = os.getpid(), system
        return self._system[1]

    def read_all(self, name: str, *, limit: int) -> bytes:
        """Read a small file. Raises FileNotFoundError, or ShardError after the last retry."""
        data = self._retry(self.path(name), lambda: self._fetch(name, 0, limit))
        assert len(data) <= limit
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Read exactly these bytes. Raises ShardError."""

        def fetch() -> bytes:
            data = self._fetch(name, offset, size)
            if len(data) < size:
                raise ConnectionError(f"received {len(data)} of {size} bytes")
            return data

        try:
            return self._retry(self.path(name), fetch)
        except FileNotFoundError:
            raise ShardError(f"{self.path(name)} no longer exists; copy it again") from None

    def names(self) -> list[str]:
        """Names of the files in the folder; only for the schemes in LISTED. Raises ShardError."""
        return list(self._listing())

    def size(self, name: str) -> int | None:
        """Size of a file in bytes; None where it does not exist. Raises ShardError."""
        try:
            info = self._retry(self.path(name), lambda: self._call(self.system().info, self.path(name)))
        except FileNotFoundError:
            return None
        return info.get("size")

    def _listing(self) -> dict[str, int]:
        entries = self._retry(self.url, lambda: self._call(self.system().ls, self.url, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of the files that exist, by name. Raises ShardError."""
        if self.scheme in LISTED:
            listing = self._listing()
            return {name: listing[name] for name in names if name in listing}

        def size(name: str) -> tuple[str, int | None]:
            try:
                info = self._retry(self.path(name), lambda: self._call(self.system().info, self.path(name)))
            except FileNotFoundError:
                return name, None
            if info.get("size") is None:
                raise ShardError(
                    f"{self.path(name)}: the server does not send its size, so it cannot be read by byte "
                    f"ranges"
                )
            return name, info["size"]

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return {name: num_bytes for name, num_bytes in pool.map(size, names) if num_bytes is not None}

    def open(self, name: str, *, size: int) -> "RemoteFile":
        """Open a file for reading; no request is sent."""
        return RemoteFile(self, name, size)

    def put(self, path: Path) -> None:
        """Upload a file under its name; it appears whole or not at all. Raises ShardError."""
        num_bytes, url = path.stat().st_size, self.path(path.name)
        patience_s = max(self.access.timeout_s, num_bytes / SLOWEST_BYTES_PER_S)

        def upload() -> None:
            self._call(self.system().put_file, str(path), url, timeout_s=patience_s)
            self.system().invalidate_cache()
            found = self._call(self.system().info, url)["size"]
            if found != num_bytes:
                raise ConnectionError(f"{found} of {num_bytes} bytes arrived")

        try:
            self._retry(url, upload, "written")
        except FileNotFoundError as error:
            raise ShardError(f"{url} cannot be written: {describe(error)}; does the bucket exist?") from None

    def remove(self, name: str) -> None:
        """Remove a file, if it exists. Raises ShardError."""
        with contextlib.suppress(FileNotFoundError):
            self._retry(
                self.path(name), lambda: self._call(self.system().rm_file, self.path(name)), "removed"
            )

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        data = self._call(self.system().cat_file, self.path(name), start=offset, end=offset + size)
        if len(data) > size:
            raise ShardError(
                f"{self.path(name)}: requested {size} bytes, received {len(data)}; the server does not serve "
                f"byte ranges"
            )
        return data

    def _call(self, function: Callable, *args: Any, timeout_s: float | None = None, **kwargs: Any) -> Any:
        # fsspec cancels asynchronous requests after this time; other file systems have limits of their own
        if getattr(self.system(), "async_impl", False):
            kwargs["timeout"] = timeout_s or self.access.timeout_s
        return function(*args, **kwargs)

    def _retry(self, what: str, call: Callable[[], T], verb: str = "read") -> T:
        """Call until it succeeds. Raises ShardError after the last try; FileNotFoundError passes."""
        wait, jitter = FIRST_WAIT_S, random.Random(os.urandom(8))
        for tries_left in range(self.access.retries, -1, -1):
            try:
                return call()
            except (FileNotFoundError, ShardError):
                raise
            except Exception as error:  # every library has its own exceptions for a failed connection
                refusal = describe_refusal(error, self.scheme)
                if refusal is not None:
                    raise ShardError(f"{what}: {refusal}") from None
                if not tries_left:
                    way_out = "raise data.retries or data.timeout_s"
                    if not self.label.startswith("data."):
                        way_out = "try again when the server answers"
                    raise ShardError(
                        f"{what} cannot be {verb}: {self.access.retries + 1} tries, the last: "
                        f"{describe(error)}; {way_out}"
                    ) from None
            time.sleep(wait * jitter.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise AssertionError("unreachable")


class RemoteFile:
    """A file of a RemoteFolder, read by byte ranges and through the folder's cache."""

    def __init__(self, folder: RemoteFolder, name: str, size: int):
        self.folder, self.name, self.size = folder, name, size
        self.path = folder.path(name)

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes: fewer at the end of the file. Raises ShardError."""
        size = max(0, min(size, self.size - offset))
        if size == 0:
            return b""
        if self.folder.cache is None:
            return self.folder.read_range(self.name, offset, size)
        return self.folder.cache.read(
            self.name,
            offset,
            size,
            file_size=self.size,
            fetch=lambda start, count: self.folder.read_range(self.name, start, count),
        )

    def forget(self, offset: int, size: int) -> bool:
        """Remove these bytes from the cache; returns that another read may give other bytes."""
        if self.folder.cache is not None:
            self.folder.cache.forget(self.name, offset, size)
        return True
