"""`dmae-shards make SRC DST`: class folders of JPEG and PNG files -> a shard folder (see dmae_ds/data/shards.py).

The files' bytes are kept as they are; only headers are looked at. The images are shuffled once, so that a shard holds
all classes, and dealt into shards by position: the result depends on SRC, --seed and --samples-per-shard, not on the
number of workers. A file that is no image keeps its number, which no sample then has.
"""

import io
import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dmae_ds.data.shards import (
    MANIFEST,
    SKIPPED,
    SOURCES,
    NewSample,
    Shard,
    ShardError,
    list_files,
    replacing,
    write_manifest,
    write_shard,
)

SUFFIXES = (".jpg", ".jpeg", ".png")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}  # MPO: what PIL calls a JPEG with more pictures appended
MAX_SHARDS = 10**6  # the six digits of a shard's name


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    src: Path
    dst: Path
    name: str
    first_number: int
    images: list[tuple[str, int]]  # (path below src, label)


def make_shards(
    src: Path, dst: Path, *, samples_per_shard: int, num_workers: int, seed: int, max_skip: int, overwrite: bool
) -> None:
    """Write the images of SRC/<class>/ into DST. Raises ShardError, without a manifest in DST, if that cannot be."""
    classes, images, num_ignored = find_images(src)
    print(f"{len(images):,} images in {len(classes):,} classes; {num_ignored:,} other files ignored")
    if len(images) > samples_per_shard * MAX_SHARDS:
        raise ShardError(f"{len(images):,} images need more than {MAX_SHARDS:,} shards; raise --samples-per-shard")
    prepare_folder(src, dst, overwrite=overwrite)
    random.Random(seed).shuffle(images)
    with replacing(dst / SOURCES) as file:
        file.writelines(json.dumps(path).encode() + b"\n" for path, _ in images)
    jobs = [
        Job(src, dst, f"shard-{number:06d}.tar", first, images[first : first + samples_per_shard])
        for number, first in enumerate(range(0, len(images), samples_per_shard))
    ]
    shards, skipped = [], []
    with tqdm(total=len(images), unit=" images", disable=None) as progress:  # None: only on a terminal
        for job, (shard, job_skipped) in zip(jobs, _run(jobs, num_workers), strict=True):
            shards.append(shard)
            skipped += job_skipped
            progress.update(len(job.images))
            if len(skipped) > max_skip:
                break
    if skipped:
        with replacing(dst / SKIPPED) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in skipped)
    if len(skipped) > max_skip or len(skipped) == len(images):
        raise ShardError(
            f"{len(skipped)} unreadable images so far, first {skipped[0]['source']!r} ({skipped[0]['reason']}), all in "
            f"{dst / SKIPPED}; mend them or allow more with --max-skip (now {max_skip}), then run with --overwrite"
        )
    write_manifest(dst, classes=classes, seed=seed, shards=shards)
    print(f"{len(images) - len(skipped):,} images in {len(shards):,} shards in {dst}; {len(skipped):,} skipped")


def find_images(src: Path) -> tuple[list[str], list[tuple[str, int]], int]:
    """Returns (classes, (path below src, label) of every image, number of other entries), all sorted by name."""
    if not src.is_dir():
        raise ShardError(f"SRC '{src}' is not a folder")
    entries = sorted(os.listdir(src))
    classes = [name for name in entries if not name.startswith(".") and (src / name).is_dir()]
    if not classes:
        raise ShardError(f"SRC '{src}' has no class folders; expected SRC/<class>/<image>")
    images, num_ignored = [], len(entries) - len(classes)
    for label, name in enumerate(classes):
        for entry in sorted(os.scandir(src / name), key=lambda entry: entry.name):
            hidden = entry.name.startswith(".")
            if not hidden and entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                images.append((f"{name}/{entry.name}", label))
            else:
                num_ignored += 1
    if not images:
        raise ShardError(f"SRC '{src}' has no {', '.join(SUFFIXES)} files in its {len(classes)} class folders")
    return classes, images, num_ignored


def prepare_folder(src: Path, dst: Path, *, overwrite: bool) -> None:
    """Make DST, and with `overwrite` remove the files of the set it holds, nothing else."""
    if dst.resolve().is_relative_to(src.resolve()):
        raise ShardError(f"DST '{dst}' lies inside SRC '{src}'; choose a folder elsewhere")
    if dst.exists() and not dst.is_dir():
        raise ShardError(f"DST '{dst}' is not a folder")
    dst.mkdir(parents=True, exist_ok=True)
    old = list_files(dst)
    if old and not overwrite:
        state = "a finished shard set" if old[0].name == MANIFEST else "files of an unfinished shard set"
        raise ShardError(f"DST '{dst}' holds {state} ({old[0].name}); add --overwrite to replace it")
    for path in old:  # the manifest first: no half-removed set looks finished
        path.unlink()


def write_job(job: Job) -> tuple[Shard, list[dict]]:
    """Write one shard (in a worker). Returns it and what was skipped: {number, source, reason}."""
    skipped = []

    def samples() -> Iterator[NewSample]:
        for number, (path, label) in enumerate(job.images, start=job.first_number):
            try:
                data = (job.src / path).read_bytes()
                extension, width, height = read_header(data)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                skipped.append({"number": number, "source": path, "reason": reason})
                continue
            yield NewSample(number, extension, data, width, height, label)

    return write_shard(job.dst, job.name, samples()), skipped


def read_header(data: bytes) -> tuple[str, int, int]:
    """Returns (extension by content, width, height). Raises ValueError that says why it is no JPEG or PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            return EXTENSIONS[image.format], image.width, image.height
    except UnidentifiedImageError:  # its own text holds a memory address
        raise ValueError("not a JPEG or PNG image") from None
    except Exception as error:  # PIL lets nearly everything escape from a broken header
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _run(jobs: list[Job], num_workers: int) -> Iterator[tuple[Shard, list[dict]]]:
    """The results of the jobs, in their order. Leaving early drops the jobs that have not begun."""
    pool = ProcessPoolExecutor(num_workers, initializer=_ignore_interrupt)
    try:
        yield from pool.map(write_job, jobs)
    except BrokenProcessPool:
        raise ShardError("a worker died (out of memory?); run again with fewer --workers and --overwrite") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
