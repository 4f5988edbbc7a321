"""Measure this machine: `dmae-shards bench SRC` compares conversion, reading and decoding with alternatives.

Every row does its work once a round, in turns, so that other work of the machine affects all of them alike;
each figure is the median of a ratio within its round. CPU time includes children and system time. Everything
is written below a scratch folder and removed; the files of SRC are read once before, so the cache is warm.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_prep.find import find_images
from data_prep.timing import Row, Section, format_table, time_interleaved
from dmae_ds.data.shards import ShardError


def load_sections() -> dict[str, Callable[[Path, Path], Section]]:
    """Sections by name; reading and decoding import torch."""
    from data_prep.bench_reading import decoding, reading

    return {"conversion": conversion, "reading": reading, "decoding": decoding}


def run_bench(src: Path, *, limit: int, rounds: int, scratch: Path | None, only: str | None) -> None:
    """Print a table for each section, or for the one named `only`."""
    sections = {"conversion": conversion} if only == "conversion" else load_sections()
    wanted = list(sections) if only is None else [only]
    with tempfile.TemporaryDirectory(prefix="dmae-shards-", dir=scratch) as folder:
        images = _choose_images(src, Path(folder, "images"), limit)
        for name in wanted:
            section = sections[name](images, Path(folder))
            print(format_table(section, time_interleaved(section.rows, rounds)), end="\n\n", flush=True)


def conversion(images: Path, scratch: Path) -> Section:
    """Conversion of a folder to tars, compared with GNU tar.

    tar and webdataset do not wait until their files are on the disk; `+ fsync` rows do, as dmae-shards does.
    """
    listing = find_images(images)
    dst = scratch / "out"

    def clean() -> None:
        shutil.rmtree(dst, ignore_errors=True)
        dst.mkdir()
        os.sync()  # so that this row does not pay for the writes of the one before

    def tar() -> None:
        subprocess.run(["tar", "-chf", dst / "all.tar", "-C", images, "."], check=True)

    def ours(workers: int) -> Callable[[], None]:
        arguments = ["make", images, dst, "--workers", str(workers)]
        return lambda: _run_python("-m", "data_prep.cli", *arguments)

    def tar_fsync() -> None:
        tar()
        _fsync(dst / "all.tar")

    rows = [
        Row("GNU tar", tar, clean),
        Row("GNU tar + fsync", tar_fsync, clean),
        Row("floor: read and write", lambda: _copy(images, listing, dst / "all"), clean),
        Row("floor + fsync", lambda: (_copy(images, listing, dst / "all"), _fsync(dst / "all")), clean),
        Row("dmae-shards, 1 worker", ours(1), clean),
        Row("dmae-shards, 2 workers", ours(2), clean),
        Row(
            "webdataset.ShardWriter",
            lambda: _run_python("-m", "data_prep.bench_webdataset", images, dst),
            clean,
        ),
    ]
    return Section("conversion", "images", len(listing), rows)


def _copy(images: Path, listing, out: Path) -> None:
    """Copy the bytes alone: no header, no checksum, no order."""
    buffer, src = bytearray(2**28), os.fsencode(images)
    view = memoryview(buffer)
    target = os.open(out, os.O_WRONLY | os.O_CREAT)
    for number in range(len(listing)):
        source = os.open(b"%b/%b" % (src, listing.path(number)), os.O_RDONLY)
        os.write(target, view[: os.readv(source, (view,))])
        os.close(source)
    os.close(target)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _run_python(*arguments: object) -> None:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise ShardError(f"bench: a row failed: {' '.join(done.stderr.split())[-500:]}")


def _choose_images(src: Path, images: Path, limit: int) -> Path:
    """Return SRC, or a folder of links to `limit` of its images, over all classes; reads each image once."""
    listing = find_images(src)
    use_links, num_images = len(listing) > limit, min(limit, len(listing))
    root, folder = os.fsencode(src.resolve()), os.fsencode(images if use_links else src)
    for place in range(num_images):
        path = listing.path(place * len(listing) // num_images)
        if use_links:
            os.makedirs(os.path.dirname(b"%b/%b" % (folder, path)), exist_ok=True)
            os.symlink(b"%b/%b" % (root, path), b"%b/%b" % (folder, path))
        with open(b"%b/%b" % (folder, path), "rb") as file:
            file.read()
    return Path(os.fsdecode(folder))
