"""data_prep/cli.py: every mistake of the user is one line on stderr and exit code 2."""

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


def assert_refused(result, *words):
    """The command ended with exit code 2 and one line that carries the words."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("dmae-shards: error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_make_and_info(src, tmp_path):
    result = run("make", src, tmp_path / "dst", "--samples-per-shard", 5, "--workers", 2)
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("12 images in 3 classes", "4 other files", "2 .txt, 2 hidden", "12 images in 3 shards"):
        assert words in result.stdout
    info = run("info", tmp_path / "dst")
    assert info.returncode == 0
    table = dict(line.split(maxsplit=1) for line in info.stdout.splitlines())
    assert (table["samples"], table["shards"]) == ("12", "3")


def test_the_same_command_again_changes_nothing(src, tmp_path):
    assert run("make", src, tmp_path / "dst").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    again = run("make", src, tmp_path / "dst", "--workers", 1)
    assert (again.returncode, again.stderr) == (0, "") and "--overwrite" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before


def test_a_finished_set_is_not_overwritten_without_the_option(src, tmp_path):
    assert run("make", src, tmp_path / "dst").returncode == 0
    manifest = (tmp_path / "dst" / "manifest.json").read_bytes()
    assert_refused(
        run("make", src, tmp_path / "dst", "--seed", 1), "a finished shard set", "seed", "--overwrite"
    )
    assert (tmp_path / "dst" / "manifest.json").read_bytes() == manifest
    assert run("make", src, tmp_path / "dst", "--seed", 1, "--overwrite").returncode == 0
    assert (tmp_path / "dst" / "manifest.json").read_bytes() != manifest


def test_tars_of_other_tools_are_not_overwritten_without_the_option(src, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "shard-000000.tar").write_text("mine")  # webdataset's tools use this name, too
    assert_refused(run("make", src, tmp_path / "dst"), "shard-000000.tar", "--overwrite")
    assert (tmp_path / "dst" / "shard-000000.tar").read_text() == "mine"


def test_unusable_sources_and_destinations(src, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    (tmp_path / "file").touch()
    dst = tmp_path / "dst"
    assert_refused(run("make", tmp_path / "none", dst), "SRC", str(tmp_path / "none"))
    assert_refused(run("make", tmp_path / "flat", dst), "SRC", "class folders", "SRC/<class>/<image>")
    assert_refused(run("make", tmp_path / "empty", dst), "SRC", ".jpg, .jpeg, .jpe, .png")
    assert_refused(run("make", src, dst, "--quality", 90), "--quality", "--resize")
    assert_refused(run("make", src, src / "dst"), "DST", "inside SRC")
    assert_refused(run("make", src, tmp_path / "file"), "DST", str(tmp_path / "file"))
    assert_refused(run("info", dst), "DST", "manifest.json", "dmae-shards make SRC")
    assert not dst.exists() and not (src / "dst").exists()


@pytest.mark.parametrize(
    "args, word",
    [
        ([], "COMMAND"),
        (["make", "a"], "DST"),
        (["make", "a", "b", "--workers", "0"], "0 is less than 1"),
        (["make", "a", "b", "--max-skip", "x"], "invalid integer value: 'x'"),
        (["burn"], "invalid choice: 'burn'"),
        (["bench", "a", "--rounds", "0"], "0 is less than 1"),
        (["make", "a", "b", "--quality", "101"], "101 is more than 100"),
        (["make", "a", "b", "--labels", "x", "--unlabelled"], "not allowed with"),
        (["verify", "a", "--sample", "1"], "expected a percentage such as 1%"),
    ],
)
def test_wrong_arguments_are_refused(args, word):
    assert_refused(run(*args), word)


def test_an_unreadable_image_is_named(src, tmp_path):
    (src / "ant" / "1.JPEG").write_bytes(b"no image")
    assert_refused(run("make", src, tmp_path / "dst"), "ant/1.JPEG", "--max-skip", "skipped.jsonl")
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
        # background jobs of a shell ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (dst / "shard-000003.tar").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group, including workers
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in stderr and stderr.count("\n") == 1
    assert not (dst / "manifest.json").exists()
