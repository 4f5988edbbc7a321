"""What the run folder keeps of each start, and what a resumed run says that it changes or does not do."""

from __future__ import annotations

import subprocess

import pytest
import torch

from dmae_ds.cli.main import main
from dmae_ds.config.load import dump_config, load_config
from dmae_ds.config.saved import FILE, read_starts
from dmae_ds.distributed.world import World
from dmae_ds.train.checkpoint.student_file import StudentFiles
from dmae_ds.train.preflight import prepare
from dmae_ds.train.starts import (
    COMPARED,
    append_start,
    changes,
    commit,
    describe_environment,
)


def record(run_dir, config, environment, *, step):
    append_start(run_dir, config, environment, step=step)
    (run_dir / "config.yaml").write_text(dump_config(config))


def test_a_start_is_recorded_and_the_next_one_says_what_it_changes(tmp_path):
    before = load_config("digits_mae", [f"run.dir={tmp_path}"])
    after = load_config("digits_mae", [f"run.dir={tmp_path}", "optim.base_lr=1e-3", "data.val=null"])
    old = describe_environment(device="cpu", world_size=1)
    record(tmp_path, before, old, step=0)
    assert changes(tmp_path, before, old) == []
    new = {**old, "torch": "9.9", "world_size": 2, "command": "another", "host": "b"}
    assert set(changes(tmp_path, after, new)) == {
        "changed optim.base_lr 0.006 -> 0.001",
        "changed data.val runs/digits/shards/val -> null",
        f"changed torch {old['torch']} -> 9.9",
        "changed world_size 1 -> 2",
        f"changed host {old['host']} -> b",
    }
    record(tmp_path, after, new, step=7)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"half a li')  # a kill
    first, second = read_starts(tmp_path)
    assert set(first) == {"when", "step", "config", "environment"}
    assert {*COMPARED, "command", "folder", "processor"} == set(first["environment"])
    assert first["environment"]["deepspeed"] and first["config"]["optim"]["base_lr"] == 0.006
    assert second["step"] == 7 and second["environment"]["torch"] == "9.9"


def test_a_run_from_before_starts_were_kept_says_what_changes_in_its_config(tmp_path):
    config = load_config("digits_mae", [f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    environment = describe_environment(device="cpu", world_size=1)
    assert read_starts(tmp_path) == [] and changes(tmp_path, config, environment) == []
    (tmp_path / "config.yaml").write_text("run: {}\n")
    (line,) = changes(tmp_path, config, environment)
    assert "config.yaml" in line and "run.dir" in line
    (tmp_path / "config.yaml").unlink()
    (line,) = changes(tmp_path, config, environment)
    assert "config.yaml" in line


def test_the_commit_is_that_of_the_checkout_and_a_wheel_has_none(tmp_path):
    assert commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16)
    (tmp_path / "file").write_text("a")
    subprocess.run([*git, "add", "file"], check=True)
    assert commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize("files_of", [0, 19, 20], ids=["no student", "a student of before", "finished"])
def test_resuming_a_finished_run_says_so_and_needs_no_torch(tiny_recipe, tmp_path, capsys, files_of):
    """Where a kill left the exported student of an earlier step, the run is resumed to write it again."""
    run_dir = tmp_path / "run"
    words = [*tiny_recipe, f"run.dir={run_dir}"]
    new = prepare(load_config(words[0], words[1:]), World(), resume="never")
    assert new.num_steps == 20 and not new.is_finished
    new.folder.begin(20)
    new.folder.commit(20, {"step": 20, "position": 320, **new.identity}, {})
    if files_of:
        files = StudentFiles(run_dir, {"": {}})
        files.write({"student.a": torch.zeros(1), "b": torch.zeros(1)}, files_of)
        files.publish()
    assert prepare(new.config, World(), resume="auto").is_finished == (files_of == 20)
    if files_of == 20:
        assert main(["train", *words, "--resume", "auto"]) == 0
        line = capsys.readouterr().err
        assert all(
            word in line for word in ("20 of 20", str(run_dir / "student.safetensors"), "optim.epochs")
        )
        longer = load_config(words[0], [*words[1:], "optim.epochs=9"])
        assert not prepare(longer, World(), resume="auto").is_finished
