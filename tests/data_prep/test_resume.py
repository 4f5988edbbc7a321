"""The same command continues an interrupted conversion, and the result is that of an uninterrupted one."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.find import find_images
from data_prep.make import MakeOptions, make_shards
from data_prep.verify import verify_shards
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from tests.messages import refused

ROOT = Path(__file__).parents[2]


def command(src, dst, workers, *options):
    arguments = ["make", str(src), str(dst), "--samples-per-shard", "4", "--workers", str(workers)]
    return [sys.executable, "-m", "data_prep.cli", *arguments, "--max-skip", "9", *options]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A folder of 400 small images in 5 classes, three of them unusable, and its uninterrupted conversion."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for number in range(400):
        path = folder / "src" / f"class-{number % 5}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
        if number % 150 == 0:
            path.write_bytes(path.read_bytes()[:50])
    make_shards(folder / "src", folder / "whole", MakeOptions(samples_per_shard=4), num_workers=1, max_skip=9)
    return folder


def kill_and_resume(many, dst, rng, *options):
    """Kill a run and resume it; returns the shards in the killed run's journal, None if it was finished."""
    process = subprocess.Popen(
        command(many / "src", dst, rng.choice([1, 2, 3]), *options), cwd=ROOT, stdout=subprocess.DEVNULL
    )
    time.sleep(rng.uniform(0.1, 0.7) if rng.random() < 0.3 else 0)
    stop_at = rng.randrange(0, 100)
    goals = (dst / f"shard-{stop_at:06d}.tar", dst / "manifest.json")
    while process.poll() is None and not any(goal.exists() for goal in goals):
        time.sleep(0.001)
    process.kill()
    process.wait()
    journal = dst / "journal.jsonl"
    reached = journal.read_bytes().count(b"\n") - 1 if journal.exists() else None
    done = subprocess.run(
        command(many / "src", dst, rng.choice([1, 2, 3]), *options),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(dst) == contents(many / "whole")
    return reached


def test_killed_runs_give_the_shards_of_uninterrupted_ones(many, tmp_path):
    rng = random.Random(0)
    reached = [kill_and_resume(many, tmp_path / str(number), rng) for number in range(3)]
    assert any(0 < (number or 0) < 100 for number in reached), reached
    verify_shards(tmp_path / "0")


@pytest.mark.slow
def test_a_hundred_killed_runs_give_the_shards_of_uninterrupted_ones(many, tmp_path):
    rng, reached = random.Random(1), []
    for _ in range(100):
        reached.append(kill_and_resume(many, tmp_path / "dst", rng))
        verify_shards(tmp_path / "dst")
        shutil.rmtree(tmp_path / "dst")
    print(sorted(-1 if number is None else number for number in reached))
    assert sum(0 < (number or 0) < 100 for number in reached) > 50


def test_workers_do_not_outlive_a_killed_run(many, tmp_path):
    process = subprocess.Popen(command(many / "src", tmp_path / "dst", 3), cwd=ROOT, stdout=subprocess.PIPE)
    while not (tmp_path / "dst" / "shard-000002.tar").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.stdout.read() is not None  # the pipe ends only when every worker has ended, too


def unfinished(many, dst):
    """Make an unfinished folder with a journal of 10 shards."""
    shutil.copytree(many / "whole", dst)
    (dst / "manifest.json").unlink()
    for path in sorted(dst.glob("shard-*"))[20:]:
        path.unlink()
    whole, journal = dst.parent / "other", dst / "journal.jsonl"
    process = subprocess.Popen(command(many / "src", whole, 1), cwd=ROOT, stdout=subprocess.PIPE)
    while not (whole / "shard-000014.tar").exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()  # waits until its worker has ended, too
    lines = (whole / "journal.jsonl").read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:11]))
    shutil.rmtree(whole)


@pytest.fixture
def begun(many, tmp_path):
    """A copy of the sources with their times, and an unfinished folder of them."""
    shutil.copytree(many / "src", tmp_path / "src")
    unfinished(many, tmp_path / "dst")
    return tmp_path / "src", tmp_path / "dst"


def resume(src, dst, **changes):
    overwrite = changes.pop("overwrite", False)
    make_shards(
        src, dst, MakeOptions(samples_per_shard=4, **changes), num_workers=2, max_skip=9, overwrite=overwrite
    )


def source_of(dst, number):
    return json.loads((dst / "sources.txt").read_text().splitlines()[number])


def test_done_shards_are_not_made_again(begun, many):
    src, dst = begun
    before = (dst / "shard-000003.tar").stat().st_ino
    resume(src, dst)
    assert (dst / "shard-000003.tar").stat().st_ino == before
    assert contents(dst) == contents(many / "whole")


def test_a_cut_journal_and_missing_or_cut_shards_are_repaired(begun, many):
    src, dst = begun
    journal = dst / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-17])
    (dst / "shard-000001.tar").unlink()
    os.truncate(dst / "shard-000002.tar", 100)
    (dst / "shard-000003.index.npy").write_bytes(b"")
    (dst / "shard-000050.tar.tmp").write_bytes(b"half")
    resume(src, dst)
    assert contents(dst) == contents(many / "whole")


def test_other_options_are_refused_by_name(begun):
    src, dst = begun
    before = contents(dst)
    for changes, words in (
        ({"seed": 5}, ("seed", "0", "5")),
        ({"json": True}, ("json", "False", "True")),
        ({"verify": "full"}, ("verify", "'header'", "'full'")),
    ):
        with refused("DST", "unfinished", *words, "--overwrite", error=ShardError):
            resume(src, dst, **changes)
    assert contents(dst) == before
    resume(src, dst, seed=5, overwrite=True)
    assert ShardSet.open(dst, label="DST").seed == 5


def test_changed_sources_are_refused(begun, many):
    src, dst = begun
    path = src / source_of(dst, 6)
    path.write_bytes((src / source_of(dst, 7)).read_bytes())
    with refused("SRC", "shard-000001.tar", "lines 5 to 8", "sources.txt", "--overwrite", error=ShardError):
        resume(src, dst)
    (src / "class-0" / "new.jpg").write_bytes(path.read_bytes())
    with refused("SRC", "labels", "--overwrite", error=ShardError):
        resume(src, dst)
    resume(src, dst, overwrite=True)
    assert ShardSet.open(dst, label="DST").num_samples == 401 - 3


def test_a_repaired_image_is_included(many, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    shutil.copytree(many / "src", src)
    with refused("skipped.jsonl", "--max-skip 3 (now 0)", error=ShardError):
        make_shards(src, dst, MakeOptions(samples_per_shard=4), max_skip=0)
    for number in (0, 150, 300):
        path = src / f"class-{number % 5}" / f"{number}.jpg"
        path.write_bytes((src / "class-1" / "1.jpg").read_bytes())
    make_shards(src, dst, MakeOptions(samples_per_shard=4), max_skip=0)
    assert ShardSet.open(dst, label="DST").num_samples == 400 and not (dst / "skipped.jsonl").exists()
    verify_shards(dst)


def test_a_full_disk_is_one_line_and_resumable(many, tmp_path):
    """RLIMIT_FSIZE has the same effect: a write fails in the middle of a shard, with an OSError."""
    dst = tmp_path / "dst"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    limited += f"import sys; sys.argv[1:] = {command(many / 'src', dst, 2)[3:]!r}; "
    limited += "from data_prep.cli import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert str(dst) in done.stderr and "cannot be written" in done.stderr
    assert not list(dst.glob("*.tmp")) and not (dst / "manifest.json").exists()
    resume(many / "src", dst)
    assert contents(dst) == contents(many / "whole")


def test_two_runs_do_not_write_one_folder(many, tmp_path, monkeypatch):
    from data_prep import journal

    monkeypatch.setattr(journal, "LOCK_WAIT_S", 0.1)
    dst = tmp_path / "dst"
    dst.mkdir()
    held = journal.Journal(dst, forget=False)
    with refused("another `dmae-shards`", str(dst), error=ShardError):
        resume(many / "src", dst)
    held.close()
    resume(many / "src", dst)


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_files(tmp_path):
    """With a million images of a few bytes, the peaks of all processes together stay under 1 GiB."""
    src, image = tmp_path / "src", tmp_path / "1.png"
    Image.new("L", (1, 1)).save(image)
    data = image.read_bytes()
    for folder in range(100):
        (src / f"class-{folder:03d}").mkdir(parents=True)
        first = src / f"class-{folder:03d}" / "image-00000.png"
        first.write_bytes(data)
        for number in range(1, 10_000):
            os.link(first, first.with_name(f"image-{number:05d}.png"))
    arguments = ["make", src, tmp_path / "dst", "--workers", "4", "--samples-per-shard", "10000"]
    process = subprocess.Popen([sys.executable, "-m", "data_prep.cli", *arguments], cwd=ROOT)
    peaks = {}
    while process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            for pid in [str(process.pid), *children.read_text().split()]:
                status = Path(f"/proc/{pid}/status").read_text()
                peaks[pid] = int(status.partition("VmHWM:")[2].split()[0])
        except (OSError, IndexError):
            pass
        time.sleep(0.2)
    assert process.returncode == 0 and len(peaks) == 5
    print(f"peaks in MiB: {[peak // 1024 for peak in peaks.values()]}")
    assert sum(peaks.values()) < 2**20  # KiB
    assert len(find_images(src)) == ShardSet.open(tmp_path / "dst", label="DST").num_samples == 10**6
