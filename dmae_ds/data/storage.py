"""Folders of files, here or behind a URL, read by position: what the reader needs of a file system and nothing more.

A local folder (also NFS, Lustre, a mounted bucket) is read by `pread`; `http(s)://`, `s3://`, `gs://` and `hf://` by byte
ranges through fsspec, with a time limit, retries that back off, and an optional cache on a local disk (cache.py). No
torch here, and fsspec is imported only when a URL is opened.
"""

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
from dmae_ds.data.shards import ShardError

if TYPE_CHECKING:
    from dmae_ds.config.run import DataConfig

# URL scheme -> what must be installed beside fsspec
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
LISTED = ("s3", "gs", "hf")  # one listing gives the sizes of a whole folder
PERMANENT_STATUS = (400, 401, 403, 404, 405, 410, 416)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 10.0
NUM_THREADS = 16  # of requests under way at once, in one process

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """How URLs are read; local folders need none of it."""

    retries: int = 8
    timeout_s: float = 30.0
    cache_dir: Path | None = None
    cache_gib: float = 50.0

    @classmethod
    def of(cls, data: "DataConfig") -> "Access":
        cache_dir = None if data.cache_dir is None else Path(data.cache_dir).expanduser()
        return cls(
            retries=data.retries, timeout_s=data.timeout_s, cache_dir=cache_dir, cache_gib=data.cache_gib
        )


def is_url(location: str | Path) -> bool:
    return "://" in str(location)


def open_folder(location: str | Path, *, access: Access, label: str) -> "LocalFolder | RemoteFolder":
    """label: what the user calls it. Raises ShardError for a scheme that is unknown or lacks its package."""
    if not is_url(location):
        return LocalFolder(Path(location))
    return RemoteFolder(str(location), access=access, label=label)


class LocalFolder:
    is_remote = False

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read_all(self, name: str, *, limit: int) -> bytes:
        """A small file, whole. Raises OSError; FileNotFoundError where it isn't."""
        with open(self.folder / name, "rb") as file:
            return file.read(limit)

    def names(self) -> list[str]:
        """What is there. Raises OSError."""
        return os.listdir(self.folder)

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """name -> bytes of those that are there. Raises OSError."""
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry for entry in entries}
        return {name: found[name].stat().st_size for name in names if name in found}

    def open(self, name: str, *, size: int) -> "LocalFile":
        """Raises ShardError."""
        try:
            return LocalFile(os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC), self.path(name))
        except OSError as error:
            raise ShardError(f"{self.path(name)} cannot be opened: {error.strerror}") from None


class LocalFile:
    """A descriptor, given back when the object goes. `pread` moves no file position, so forked workers may share it."""

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
        """Whether reading once more may give other bytes: not here."""
        return False

    def __del__(self):
        os.close(self.descriptor)


class RemoteFolder:
    """One per process and URL: a worker that was forked or spawned opens its own connections."""

    is_remote = True

    def __init__(self, url: str, *, access: Access, label: str):
        self.url, self.access, self.label = url.rstrip("/"), access, label
        self.scheme = url.partition("://")[0]
        if self.scheme not in PACKAGES:
            raise ShardError(
                f"{label} '{url}': {self.scheme}:// is unknown; give a folder, or a URL of {', '.join(PACKAGES)}"
            )
        self.cache: ChunkCache | None = None
        self._system: tuple[int, Any] | None = None  # (process, fsspec's file system)
        self.system()

    def __getstate__(self):
        return {**self.__dict__, "_system": None}

    def use_cache(self, fingerprint: str) -> None:
        """Keep what is read under access.cache_dir, if that was asked for."""
        if self.access.cache_dir is not None:
            self.cache = make_cache(
                self.access.cache_dir, fingerprint, limit_bytes=int(self.access.cache_gib * 2**30)
            )

    def path(self, name: str) -> str:
        return f"{self.url}/{quote(name) if self.scheme.startswith('http') else name}"

    def system(self) -> Any:
        if self._system is None or self._system[0] != os.getpid():
            try:
                import fsspec

                system = fsspec.filesystem(self.scheme, skip_instance_cache=True)
            except ImportError as error:
                raise ShardError(
                    f"{self.label} '{self.url}': {self.scheme}:// needs {PACKAGES[self.scheme]} ({error}); "
                    f"install dmae-ds[remote]"
                ) from None
            logging.getLogger("fsspec").setLevel(logging.ERROR)
            if self.scheme == "s3":
                system.retries = 1  # its own know nothing of our limits
            self._system = os.getpid(), system
        return self._system[1]

    def read_all(self, name: str, *, limit: int) -> bytes:
        """A small file, whole. Raises FileNotFoundError, or ShardError after the last retry."""
        data = self._try(self.path(name), lambda: self._fetch(name, 0, limit))
        assert len(data) <= limit
        return data

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Exactly these bytes. Raises ShardError."""

        def fetch() -> bytes:
            data = self._fetch(name, offset, size)
            if len(data) < size:
                raise ConnectionError(f"{len(data)} of {size} bytes came")
            return data

        try:
            return self._try(self.path(name), fetch)
        except FileNotFoundError:
            raise ShardError(f"{self.path(name)} is not there any more; copy it again") from None

    def names(self) -> list[str]:
        """What is there; only of the schemes in LISTED. Raises ShardError."""
        return list(self._listing())

    def _listing(self) -> dict[str, int]:
        entries = self._try(self.url, lambda: self._call(self.system().ls, self.url, detail=True))
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries}

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """name -> bytes of those that are there. Raises ShardError."""
        if self.scheme in LISTED:
            found = self._listing()
            return {name: found[name] for name in names if name in found}

        def size(name: str) -> tuple[str, int | None]:
            try:
                info = self._try(self.path(name), lambda: self._call(self.system().info, self.path(name)))
            except FileNotFoundError:
                return name, None
            if info.get("size") is None:
                raise ShardError(
                    f"{self.path(name)}: the server does not say how long it is; it cannot be read by ranges"
                )
            return name, info["size"]

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return {name: found for name, found in pool.map(size, names) if found is not None}

    def open(self, name: str, *, size: int) -> "RemoteFile":
        return RemoteFile(self, name, size)

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        data = self._call(self.system().cat_file, self.path(name), start=offset, end=offset + size)
        if len(data) > size:
            raise ShardError(
                f"{self.path(name)}: asked for {size} bytes, {len(data)} came; the server does not serve byte ranges"
            )
        return data

    def _call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.system(), "async_impl", False):
            kwargs["timeout"] = (
                self.access.timeout_s
            )  # fsspec cancels the request; the others have limits of their own
        return function(*args, **kwargs)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        wait, jitter = FIRST_WAIT_S, random.Random(os.urandom(8))
        for tries_left in range(self.access.retries, -1, -1):
            try:
                return call()
            except (FileNotFoundError, ShardError):
                raise
            except PermissionError as error:
                raise ShardError(
                    f"{what}: not allowed ({error}); check the credentials of {self.scheme}://"
                ) from None
            except Exception as error:  # every library has exceptions of its own for a connection that failed
                status = getattr(error, "status", None)
                reason = f"{type(error).__name__} {' '.join(str(error).split())}".strip()[:200]
                if status in PERMANENT_STATUS:
                    raise ShardError(f"{what}: the server refused it ({reason})") from None
                if not tries_left:
                    tries = self.access.retries + 1
                    raise ShardError(
                        f"{what} cannot be read: {tries} tries, the last: {reason}; see data.retries and data.timeout_s"
                    ) from None
            time.sleep(wait * jitter.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT_S)
        raise AssertionError("unreachable")


class RemoteFile:
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
        """Drop these bytes from the cache; whether reading once more may give other ones: here always."""
        if self.folder.cache is not None:
            self.folder.cache.forget(self.name, offset, size)
        return True
