"""Index and manifest for existing WebDataset tars, which stay unchanged: `dmae-shards index TARS [DST]`.

Each tar is read once from front to back, since the index holds the crc32 of every image; a remote one is
streamed. A sample is what webdataset takes for one: consecutive members with equal names up to the first dot.
In addition, links to other members are followed and members that stand apart are joined (data_prep/tars.py).
Its image is the first .jpg, .jpeg or .png (or --image EXT), its label the number in .cls (or --label EXT, or
json:KEY); pickled labels are not read. Samples without a usable image are skipped and listed, a damaged tar
is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data_prep.class_list import read_classes
from data_prep.folders import check_classes
from data_prep.scan import NotRead
from data_prep.skip_limit import SkipLimit
from data_prep.tars import REMOTE, Labels, open_tar, read_samples
from data_prep.workers import Workers
from dmae_ds.data.refusals import describe, describe_refusal
from dmae_ds.data.shards import (
    MANIFEST,
    RECORD,
    SKIPPED,
    SOURCES,
    Shard,
    ShardError,
    encode_index,
    index_name,
    is_shard_name,
    write_manifest,
    write_skipped,
)
from dmae_ds.output.durable import replacing

COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz|tzst)$")


@dataclass(frozen=True)
class Job:
    """One tar to read."""

    number: int
    base: str
    name: str
    image: str | None
    label: str | None


@dataclass(frozen=True)
class Result:
    """Samples of one tar; `names` are the members that are images, one for each row of `records`."""

    number: int
    name: str
    bytes: int
    records: np.ndarray
    names: list[str]
    skipped: list[tuple[str, str]]  # (key, reason)
    num_unlabelled: int
    first_unlabelled: str  # its image's name


def index_tars(
    tars: str,
    *,
    dst: Path | None,
    image: str | None,
    label: str | None,
    classes: Path | None,
    workers: int,
    max_skip: int,
    overwrite: bool,
) -> None:
    """Write indexes, sources.txt and, last, the manifest into DST.

    Raises ShardError, and then writes no manifest.
    """
    Labels(label or "cls")  # a wrong --label is an error now, not after an hour of reading
    base, names = find_tars(tars)
    dst = _prepare_folder(tars, dst, overwrite=overwrite)
    jobs = [Job(number, base, name, image, label) for number, name in enumerate(names)]
    limit = SkipLimit(max_skip)
    progress = tqdm(total=len(jobs), unit=" shards", disable=None)
    with Workers(_work, workers) as pool, _IndexWriter(dst) as written, progress:
        for result in _in_order(pool.run(jobs)):
            written.add(result)
            progress.update()
            limit.check(written.skipped)
    write_skipped(dst, written.skipped)
    num_samples, num_skipped = written.num_samples, len(written.skipped)
    if num_skipped > max_skip or not num_samples:
        raise _too_few(written, dst, max_skip=max_skip)
    extension = label or "cls"
    if 0 < written.num_unlabelled < num_samples:
        raise ShardError(
            f"{written.num_unlabelled:,} of {num_samples:,} samples have no .{extension}, first "
            f"{written.first_unlabelled!r}; add the missing members, or choose another --label (one that no "
            f"sample has, such as --label none, makes the set unlabelled)"
        )
    class_names, notes = _name_classes(classes, written.labels)
    for note in notes:
        print(note)
    write_manifest(
        dst,
        classes=class_names,
        seed=None,
        shards=written.shards,
        base=None if base == str(dst.resolve()) else base,
        made={
            "by": "dmae-shards index",
            "image": image,
            "label": label,
            "num_sources": num_samples,
            "num_skipped": num_skipped,
            "sources_sha256": written.sources_digest.hexdigest(),
        },
    )
    labels = f"{len(written.labels):,} labels"
    if written.num_unlabelled:
        labels = f"no labels (no member .{extension})"
    print(
        f"{num_samples:,} samples in {len(written.shards):,} shards, {labels}; {num_skipped:,} skipped; "
        f"index and manifest are in {dst}"
    )


def _prepare_folder(tars: str, dst: Path | None, *, overwrite: bool) -> Path:
    """Make the folder for index and manifest.

    Raises ShardError if it holds a finished set that should stay.
    """
    if dst is None:
        if REMOTE.match(tars):
            raise ShardError(
                f"TARS '{tars}' is remote; add a folder for index and manifest: dmae-shards index TARS DST"
            )
        dst = Path(tars)
    if (dst / MANIFEST).exists() and not overwrite:
        raise ShardError(
            f"DST '{dst}' holds a finished shard set ({MANIFEST}); add --overwrite to replace its index"
        )
    dst.mkdir(parents=True, exist_ok=True)
    (dst / MANIFEST).unlink(missing_ok=True)
    return dst


class _IndexWriter:
    """Indexes and sources.txt of tars that are added in order, with what the manifest needs."""

    def __init__(self, dst: Path):
        self.dst = dst
        self.shards: list[Shard] = []
        self.skipped: list[dict] = []
        self.labels: set[int] = set()
        self.num_samples = 0
        self.num_unlabelled = 0
        self.first_unlabelled = ""
        self.sources_digest = hashlib.sha256()
        self._sources = replacing(dst / SOURCES)

    def __enter__(self) -> "_IndexWriter":
        self._sources_file = self._sources.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._sources.__exit__(*error)

    def add(self, result: Result) -> None:
        """Number the samples of a tar, and write its index and its lines of sources.txt."""
        records = result.records
        records["number"] = np.arange(self.num_samples, self.num_samples + len(records))
        self.num_samples += len(records)
        self.num_unlabelled += result.num_unlabelled
        if result.num_unlabelled and not self.first_unlabelled:
            self.first_unlabelled = f"{result.name}/{result.first_unlabelled}"
        self.labels.update(np.unique(records["label"]).tolist())
        for key, reason in result.skipped:
            self.skipped.append({"number": None, "source": f"{result.name}/{key}", "reason": reason})
        index = encode_index(records)
        with replacing(self.dst / index_name(result.name)) as file:
            file.write(index)
        digest = hashlib.sha256(index).hexdigest()
        self.shards.append(Shard(result.name, len(records), result.bytes, digest))
        lines = b"".join(json.dumps(f"{result.name}/{name}").encode() + b"\n" for name in result.names)
        self.sources_digest.update(lines)
        self._sources_file.write(lines)


def _too_few(written: _IndexWriter, dst: Path, *, max_skip: int) -> ShardError:
    if not written.skipped:
        return ShardError("the tars have no samples; expected members such as KEY.jpg and KEY.cls")
    source, reason = written.skipped[0]["source"], written.skipped[0]["reason"]
    remedy = "pack the tars again"
    if written.num_samples:
        remedy += f", or leave these out with --max-skip {len(written.skipped)} (now {max_skip})"
    return ShardError(
        f"{written.num_samples:,} samples are usable, {len(written.skipped):,} are not, first {source!r} "
        f"({reason}), all in {dst / SKIPPED}; {remedy}"
    )


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


def _work(job: Job) -> tuple[Result, Callable[[], None]]:
    """Read one tar, in a worker."""
    labels = Labels(job.label or "cls")
    rows, names, skipped = [], [], []
    num_unlabelled, first_unlabelled = 0, ""
    try:
        with open_tar(job.base, job.name) as file:
            counted = _Counter(file)
            for sample in read_samples(counted, image=job.image, labels=labels):
                if sample.reason is not None:
                    skipped.append((sample.key, sample.reason))
                    continue
                rows.append(sample.record(0))
                names.append(sample.name)
                if sample.label is None:
                    first_unlabelled = first_unlabelled or sample.name
                    num_unlabelled += 1
    except NotRead as error:
        raise ShardError(f"{job.base}/{job.name} {error}") from None
    except ValueError as error:
        raise ShardError(
            f"{job.base}/{job.name} is damaged: {error}; copy it again, or leave it out"
        ) from None
    except Exception as error:  # a remote file system has errors of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ShardError(f"{job.base}/{job.name} cannot be read: {reason}") from None
    records = np.array(rows, dtype=RECORD)
    result = Result(
        job.number, job.name, counted.total, records, names, skipped, num_unlabelled, first_unlabelled
    )
    return result, lambda: None


def _in_order(results: Iterator[Result]) -> Iterator[Result]:
    """Yield the results in the order of their numbers."""
    waiting, following = {}, 0
    for result in results:
        waiting[result.number] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _name_classes(classes: Path | None, labels: set[int]) -> tuple[list[str], list[str]]:
    """(names of labels 0, 1, ..., notes for the user); no names where every label is -1."""
    notes: list[str] = []
    if labels == {-1}:
        return [], notes
    if classes is None:
        names = [str(label) for label in range(max(labels) + 1)]
        return names, check_classes(names, labels)
    names = read_classes(classes, notes=notes)
    if max(labels) >= len(names):
        raise ShardError(
            f"--classes '{classes}' has {len(names):,} lines, but the largest label is {max(labels)}; "
            f"add the missing names"
        )
    return names, notes + check_classes(names, labels)


class _Counter:
    """Counter of the bytes that are read of a file."""

    def __init__(self, file: BinaryIO):
        self._file, self.total = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.total += len(data)
        return data
