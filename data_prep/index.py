"""`dmae-shards index TARS [DST]`: index and manifest for WebDataset tars that somebody else wrote; the tars stay untouched.

Each tar is read once from front to back, since the index holds the crc32 of every image; a remote one is streamed. A
sample is what webdataset takes for one: consecutive members with equal names up to the first dot. Its image is the first
.jpg, .jpeg or .png (or --image EXT), its label the number in .cls (or --label EXT, or json:KEY); labels that are pickled
are not read. Samples without a usable image are skipped and listed, a damaged tar is an error.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.find import read_lines
from data_prep.tars import REMOTE, Labels, open_tar, read_samples
from data_prep.workers import Workers, check_parent
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
)
from dmae_ds.output.durable import replacing


@dataclass(frozen=True)
class Job:
    number: int
    base: str
    name: str
    image: str | None
    label: str | None


@dataclass(frozen=True)
class Result:
    """One tar, read. Row i of `records` has number i; `names` are the images' members."""

    number: int
    name: str
    bytes: int
    records: np.ndarray
    names: list[str]
    skipped: list[tuple[str, str]]  # (key, reason)
    unlabelled: int


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
    """Write indexes, sources.txt and, last, the manifest into DST. Raises ShardError, without a manifest, if that cannot be."""
    base, names = find_tars(tars)
    if dst is None:
        if REMOTE.match(tars):
            raise ShardError(
                f"TARS '{tars}' is remote; say where index and manifest go: dmae-shards index TARS DST"
            )
        dst = Path(tars)
    Labels(label or "cls")  # a wrong --label before an hour of reading
    if (dst / MANIFEST).exists() and not overwrite:
        raise ShardError(
            f"DST '{dst}' holds a finished shard set ({MANIFEST}); add --overwrite to replace its index"
        )
    dst.mkdir(parents=True, exist_ok=True)
    (dst / MANIFEST).unlink(missing_ok=True)
    jobs = [Job(number, base, name, image, label) for number, name in enumerate(names)]
    shards, skipped, unlabelled, num_samples, used = [], [], 0, 0, set()
    digest = hashlib.sha256()
    with (
        Workers(_work, workers) as pool,
        replacing(dst / SOURCES) as sources,
        tqdm(total=len(jobs), unit=" shards", disable=None) as progress,
    ):
        for result in _in_order(pool.run(jobs)):
            records = result.records
            records["number"] = np.arange(num_samples, num_samples + len(records))
            num_samples += len(records)
            used.update(np.unique(records["label"]).tolist())
            unlabelled += result.unlabelled
            skipped += [
                {"number": None, "source": f"{result.name}/{key}", "reason": reason}
                for key, reason in result.skipped
            ]
            text = encode_index(records)
            with replacing(dst / index_name(result.name)) as file:
                file.write(text)
            shards.append(Shard(result.name, len(records), result.bytes, hashlib.sha256(text).hexdigest()))
            lines = b"".join(json.dumps(f"{result.name}/{name}").encode() + b"\n" for name in result.names)
            digest.update(lines)
            sources.write(lines)
            progress.update()
            if len(skipped) > max_skip:
                break
    if skipped:
        with replacing(dst / SKIPPED) as file:
            file.writelines(json.dumps(item).encode() + b"\n" for item in skipped)
    else:
        (dst / SKIPPED).unlink(missing_ok=True)
    if len(skipped) > max_skip or not num_samples:
        first = (
            f", first {skipped[0]['source']!r} ({skipped[0]['reason']}), all in {dst / SKIPPED}"
            if skipped
            else ""
        )
        raise ShardError(
            f"{num_samples:,} samples are usable, {len(skipped):,} are not so far{first}; allow more with --max-skip (now {max_skip})"
        )
    if 0 < unlabelled < num_samples:
        raise ShardError(
            f"{unlabelled:,} of {num_samples:,} samples have no .{label or 'cls'}; choose another --label"
        )
    write_manifest(
        dst,
        classes=_name_classes(classes, used),
        seed=None,
        shards=shards,
        base=None if base == str(dst.resolve()) else base,
        made={
            "by": "dmae-shards index",
            "image": image,
            "label": label,
            "num_sources": num_samples,
            "num_skipped": len(skipped),
            "sources_sha256": digest.hexdigest(),
        },
    )
    state = f"no labels (no member .{label or 'cls'})" if unlabelled else f"{len(used):,} labels"
    print(
        f"{num_samples:,} samples in {len(shards):,} shards, {state}; {len(skipped):,} skipped; index and manifest in {dst}"
    )


def find_tars(tars: str) -> tuple[str, list[str]]:
    """Returns (base, names): tar NAME is base/NAME, base an absolute path or a URL. Raises ShardError if there is none."""
    if not REMOTE.match(tars):
        folder = Path(tars)
        if not folder.is_dir():
            raise ShardError(f"TARS '{tars}' is not a folder")
        base, names = (
            str(folder.resolve()),
            sorted(path.name for path in folder.iterdir() if path.name.endswith(".tar")),
        )
    elif tars.endswith(".tar"):
        base, _, pattern = tars.rpartition("/")
        names = list(_expand(pattern))
    else:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(tars)
            base, names = (
                tars.rstrip("/"),
                sorted(item.rstrip("/").rpartition("/")[2] for item in system.ls(path, detail=False)),
            )
        except Exception as error:  # each file system has its own
            raise ShardError(
                f"TARS '{tars}' cannot be listed ({type(error).__name__}: {error}); try URL/NAME-{{000..146}}.tar"
            ) from None
        names = [name for name in names if name.endswith(".tar")]
    if not names:
        raise ShardError(f"TARS '{tars}' has no .tar files")
    bad = next((name for name in names if not is_shard_name(name)), None)
    if bad is not None:
        raise ShardError(
            f"TARS '{tars}': a shard may not be called {bad!r}; expected a plain file name such as NAME.tar"
        )
    return base, names


def _expand(pattern: str) -> Iterator[str]:
    """'a-{08..11}.tar' -> a-08.tar, a-09.tar, ..."""
    match = re.fullmatch(r"(.*)\{([0-9]{1,9})\.\.([0-9]{1,9})\}(.*)", pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[2]), int(match[3]) + 1):
        yield f"{match[1]}{number:0{len(match[2])}d}{match[4]}"


def _work(job: Job) -> tuple[Result, Callable[[], None]]:
    labels = Labels(job.label or "cls")
    rows, names, skipped, unlabelled = [], [], [], 0
    try:
        with open_tar(job.base, job.name) as file:
            counted = _Counter(file)
            for found in read_samples(counted, image=job.image, labels=labels):
                check_parent()
                if found.reason is not None:
                    skipped.append((found.key, found.reason))
                    continue
                rows.append(found.record(0))
                names.append(found.name)
                unlabelled += found.label is None
    except ValueError as error:
        raise ShardError(
            f"{job.base}/{job.name} is damaged: {error}; copy it again, or leave it out"
        ) from None
    except Exception as error:  # a remote file system has errors of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ShardError(f"{job.base}/{job.name} cannot be read: {reason}") from None
    records = np.array(rows, dtype=RECORD)
    return Result(job.number, job.name, counted.total, records, names, skipped, unlabelled), lambda: None


def _in_order(results: Iterator[Result]) -> Iterator[Result]:
    waiting, following = {}, 0
    for result in results:
        waiting[result.number] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _name_classes(classes: Path | None, used: set[int]) -> list[str]:
    """Names of labels 0, 1, ...; none where every label is -1."""
    if used == {-1}:
        return []
    names = (
        [str(label) for label in range(max(used) + 1)]
        if classes is None
        else read_lines(classes, "--classes")
    )
    if max(used) >= len(names):
        raise ShardError(f"--classes '{classes}' has {len(names):,} lines, and there is a label {max(used)}")
    return names


class _Counter:
    """Counts the bytes that are read."""

    def __init__(self, file):
        self._file, self.total = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.total += len(data)
        return data
