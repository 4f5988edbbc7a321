"""data_prep/cli.py: every mistake is one line on stderr and exit code 2."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*args):
    return [sys.executable, "-m", "data_prep.cli", *map(str, args)]


def run(*args):
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=60)


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("dmae-shards: error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def test_make_and_info(src, tmp_path):
    result = run("make", src, tmp_path / "dst", "--samples-per-shard", 5, "--workers", 2)
    assert (result.returncode, result.stderr) == (0, "")
    assert "12 images in 3 classes; 4 other files ignored (2 .txt, 2 hidden)" in result.stdout
    assert "12 images in 3 shards" in result.stdout
    info = run("info", tmp_path / "dst")
    assert info.returncode == 0
    assert (
        dict(line.split(maxsplit=1) for line in info.stdout.splitlines()).items()
        >= {"samples": "12", "shards": "3"}.items()
    )


def test_the_same_command_again_changes_nothing(src, tmp_path):
    assert run("make", src, tmp_path / "dst").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    again = run("make", src, tmp_path / "dst", "--workers", 1)
    assert (again.returncode, again.stderr) == (0, "") and "already complete" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before


def test_finished_set_is_not_overwritten_unasked(src, tmp_path):
    assert run("make", src, tmp_path / "dst").returncode == 0
    manifest = (tmp_path / "dst" / "manifest.json").read_bytes()
    assert_one_line(run("make", src, tmp_path / "dst", "--seed", 1), "a finished shard set", "--overwrite")
    assert (tmp_path / "dst" / "manifest.json").read_bytes() == manifest
    assert run("make", src, tmp_path / "dst", "--seed", 1, "--overwrite").returncode == 0
    assert (tmp_path / "dst" / "manifest.json").read_bytes() != manifest


def test_other_peoples_shards_are_not_overwritten_unasked(src, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "shard-000000.tar").write_text("mine")  # webdataset's own tools name them so
    assert_one_line(run("make", src, tmp_path / "dst"), "shard-000000.tar", "--overwrite")
    assert (tmp_path / "dst" / "shard-000000.tar").read_text() == "mine"


def test_unusable_sources_and_destinations(src, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    (tmp_path / "file").touch()
    dst = tmp_path / "dst"
    assert_one_line(run("make", tmp_path / "none", dst), "SRC", "is not a folder")
    assert_one_line(run("make", tmp_path / "flat", dst), "no class folders", "SRC/<class>/<image>")
    assert_one_line(run("make", tmp_path / "empty", dst), "no .jpg, .jpeg, .jpe, .png files")
    assert_one_line(run("make", src, dst, "--quality", 90), "--quality", "--resize")
    assert_one_line(run("make", src, src / "dst"), "lies inside SRC")
    assert_one_line(run("make", src, tmp_path / "file"), "DST", "is not a folder")
    assert_one_line(run("info", dst), "is not a shard folder", "dmae-shards make SRC")
    assert not dst.exists() and not (src / "dst").exists()


@pytest.mark.parametrize(
    "args, part",
    [
        ([], "make | verify"),
        (["make", "a"], "DST"),
        (["make", "a", "b", "--workers", "0"], "0 is less than 1"),
        (["make", "a", "b", "--max-skip", "x"], "invalid integer value: 'x'"),
        (["burn"], "invalid choice: 'burn'"),
        (["make", "a", "b", "--quality", "101"], "101 is more than 100"),
        (["make", "a", "b", "--labels", "x", "--unlabelled"], "not allowed with"),
        (["verify", "a", "--sample", "1"], "expected a percentage such as 1%"),
    ],
)
def test_wrong_arguments(args, part):
    assert_one_line(run(*args), part)


def test_unreadable_image_is_an_error_that_names_it(src, tmp_path):
    (src / "ant" / "1.JPEG").write_bytes(b"no image")
    assert_one_line(run("make", src, tmp_path / "dst"), "ant/1.JPEG", "--max-skip", "skipped.jsonl")
    assert run("make", src, tmp_path / "dst", "--max-skip", 1, "--overwrite").returncode == 0


def test_interrupt_is_one_line_and_leaves_no_manifest(src, tmp_path):
    dst = tmp_path / "dst"
    for number in range(1000):
        (src / "cat" / f"{number}.jpg").symlink_to(src / "bee" / "0.jpg")
    process = subprocess.Popen(
        command("make", src, dst, "--samples-per-shard", 1, "--workers", 2),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    while not (dst / "shard-000003.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group, workers too
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.startswith("dmae-shards: interrupted") and stderr.count("\n") == 1
    assert not (dst / "manifest.json").exists()
