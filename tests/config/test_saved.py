"""A run's relative paths mean the folder in which it was started, from whatever folder they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmae_ds.config.load import dump_config, load_config, read_saved_config
from dmae_ds.config.saved import FILE, find_path, read_starts


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run that was started in `start` and moved to `moved`; the current folder is `elsewhere`."""
    for name in ("start/shards/train", "moved", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "start" / "own.json").touch()
    monkeypatch.chdir(tmp_path / "start")
    paths = ["data.train=shards/train", "data.val=shards/val", "deepspeed=own.json"]
    teacher = ["teacher.weights=owner/name", "student.weights=/absolute/file.pth"]
    config = load_config("dmae_vit_large_to_base", [*paths, *teacher])
    run = tmp_path / "moved"
    (run / "config.yaml").write_text(dump_config(config))
    (run / FILE).write_text(json.dumps({"environment": {"folder": str(tmp_path / "start")}}) + "\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return run


def test_paths_are_taken_from_the_folder_of_the_start(run, tmp_path, monkeypatch):
    config = read_saved_config(run)
    assert config.data.train == str(tmp_path / "start/shards/train")
    assert config.deepspeed == str(tmp_path / "start/own.json")
    # Found nowhere: the message about it names the folder of the start.
    assert config.data.val == str(tmp_path / "start/shards/val")
    assert (config.teacher.weights, config.student.weights) == ("owner/name", "/absolute/file.pth")
    for name in ("train", "val"):
        (tmp_path / "elsewhere/shards" / name).mkdir(parents=True)
    assert read_saved_config(run).data.train == config.data.train
    assert read_saved_config(run).data.val == "shards/val"
    monkeypatch.chdir(tmp_path / "start")
    assert read_saved_config(run).data.train == "shards/train"


def test_a_run_without_recorded_starts_is_read_as_before(run):
    (run / FILE).unlink()
    assert read_starts(run) == [] and read_saved_config(run).data.train == "shards/train"


@pytest.mark.parametrize("text", [None, "s3://bucket/train", "pipe:cat a.tar", "~/shards", "/shards"])
def test_what_is_no_relative_path_stays(text, tmp_path):
    assert find_path(text, tmp_path) == text
