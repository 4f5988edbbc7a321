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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data_prep.class_list import read_classes
from data_prep.dense import read_class_names
from data_prep.find_tars import find_tars
from data_prep.folders import check_classes
from data_prep.members import DenseMembers
from data_prep.scan import NotRead
from data_prep.skip_limit import SkipLimit
from data_prep.tars import REMOTE, Labels, open_tar, read_samples
from data_prep.workers import Workers
from dmae_ds.data.dense_members import DenseInfo
from dmae_ds.data.shards import (
    DENSE_RECORD,
    MANIFEST,
    RECORD,
    SKIPPED,
    SOURCES,
    Shard,
    ShardError,
    encode_index,
    index_name,
    write_manifest,
    write_skipped,
)
from dmae_ds.output.durable import replacing


@dataclass(frozen=True)
class Job:
    """One tar to read."""

    number: int
    base: str
    name: str
    image: str | None
    label: str | None
    dense: DenseInfo | None


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
    num_objects: int
    num_masks: int  # of the objects


def index_tars(
    tars: str,
    *,
    dst: Path | None,
    image: str | None,
    label: str | None,
    classes: Path | None,
    map_classes: Path | None = None,
    box_classes: Path | None = None,
    workers: int,
    max_skip: int,
    overwrite: bool,
) -> None:
    """Write indexes, sources.txt and, last, the manifest into DST.

    Raises ShardError, and then writes no manifest.
    """
    Labels(label or "cls")  # a wrong --label is an error now, not after an hour of reading
    dense = _dense_info(map_classes, box_classes)
    base, names = find_tars(tars)
    dst = _prepare_folder(tars, dst, overwrite=overwrite)
    jobs = [Job(number, base, name, image, label, dense) for number, name in enumerate(names)]
    limit = SkipLimit(max_skip)
    progress = tqdm(total=len(jobs), unit=" shards", disable=None)
    with Workers(_work, workers) as pool, _IndexWriter(dst, dense) as written, progress:
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
            f"{written.num_unlabelled:,} of {num_samples:,} samples have no .{extension}, or -1 in it, first "
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
        dense=None if dense is None else written.dense_entry(),
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

    def __init__(self, dst: Path, dense: DenseInfo | None):
        self.dst, self.dense = dst, dense
        self.num_objects = self.num_masks = 0
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
        self.num_objects += result.num_objects
        self.num_masks += result.num_masks
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

    def dense_entry(self) -> dict:
        """The manifest's `dense`. Raises ShardError where only some objects have a mask."""
        if 0 < self.num_masks < self.num_objects:
            raise ShardError(
                f"{self.num_masks:,} of {self.num_objects:,} objects have a segmentation; add it to the "
                f"others, or remove it from all"
            )
        return replace(self.dense, has_masks=self.num_masks > 0).entry()


def _dense_info(map_classes: Path | None, box_classes: Path | None) -> DenseInfo | None:
    """Classes of the tars' maps and boxes; None where neither is to be read. Raises ShardError."""
    if map_classes is None and box_classes is None:
        return None
    names = [
        None if path is None else read_class_names(path, option)
        for path, option in ((map_classes, "--map-classes"), (box_classes, "--box-classes"))
    ]
    return DenseInfo(map_classes=names[0], box_classes=names[1], has_masks=False)


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


def _work(job: Job) -> tuple[Result, Callable[[], None]]:
    """Read one tar, in a worker."""
    labels = Labels(job.label or "cls")
    rows, names, skipped = [], [], []
    num_unlabelled, first_unlabelled, num_objects, num_masks = 0, "", 0, 0
    dense = None if job.dense is None else DenseMembers(job.dense)
    try:
        with open_tar(job.base, job.name) as file:
            counted = _Counter(file)
            for sample in read_samples(counted, image=job.image, labels=labels, dense=dense):
                if sample.reason is not None:
                    skipped.append((sample.key, sample.reason))
                    continue
                rows.append(sample.record(0))
                names.append(sample.name)
                num_objects += sample.num_objects
                num_masks += sample.num_masks
                if sample.label is None or sample.label == -1:
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
    result = Result(
        number=job.number,
        name=job.name,
        bytes=counted.total,
        records=np.array(rows, dtype=RECORD if dense is None else DENSE_RECORD),
        names=names,
        skipped=skipped,
        num_unlabelled=num_unlabelled,
        first_unlabelled=first_unlabelled,
        num_objects=num_objects,
        num_masks=num_masks,
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
