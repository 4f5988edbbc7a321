"""The page names the machines and the commands of its runs, without folders of one machine."""

from __future__ import annotations

import json
import os

import pytest

from dmae_ds.cli.main import main
from dmae_ds.config.saved import FILE
from dmae_ds.evaluate.results import METRICS
from dmae_ds.report.origins import command_of, evaluations_of, render_origins
from dmae_ds.report.runs import read_run
from dmae_ds.report.study import Column, Setting, group
from tests.report.made_runs import KNN, make_run

ENVIRONMENT = {
    "python": "3.12.1",
    "torch": "2.14.1",
    "deepspeed": "0.19.8",
    "timm": None,
    "world_size": 2,
    "folder": "/a",
}


def started(folder, command, **environment):
    """A run with a start a command line."""
    path = make_run(folder, "digits_mae", results=[("knn", "all", 70.0, KNN)], num_images=1400)
    start = {
        "environment": {
            **ENVIRONMENT,
            "folder": os.getcwd(),
            "device": "cpu",
            "command": command,
            **environment,
        }
    }
    with open(path / FILE, "a") as file:
        file.write(json.dumps(start) + "\n")
    return path


@pytest.mark.parametrize(
    "typed, shown",
    [
        (
            "/venv/bin/dmae-ds train digits_mae run.dir=/a/b/mae data.train=/a/b/shards run.seed=3",
            "dmae-ds train digits_mae run.dir=OUT/mae data.train=OUT/shards run.seed=3",
        ),
        (
            "/c/dmae_ds/__main__.py --local_rank=0 train /c/my.yaml run.dir=runs/x data.val=/home/me/v",
            "python -m dmae_ds train FOLDER/my.yaml run.dir=OUT/x data.val=FOLDER/v",
        ),
        (
            "dmae-ds train r run.dir=/a/b/x data.train=/a/bc",
            "dmae-ds train r run.dir=OUT/x data.train=FOLDER/bc",
        ),
        ("dmae-ds train r 'student.name=my name'", "dmae-ds train r 'student.name=my name'"),
    ],
)
def test_a_command_is_shown_without_folders_of_its_machine(tmp_path, typed, shown):
    assert command_of(read_run(started(tmp_path / "run", typed))) == shown


def test_machines_are_counted_by_what_they_are(tmp_path):
    cpu = {"processor": "Some CPU", "command": "dmae-ds train first"}
    runs = [
        started(tmp_path / "a", **cpu),
        started(tmp_path / "b", **{**cpu, "device": "Some GPU"}),
        started(tmp_path / "c", **{**cpu, "processor": None}),
        make_run(tmp_path / "old", "digits_mae", num_images=1400),
    ]
    started_again = {**json.loads((runs[0] / FILE).read_text()), "step": 3}
    with open(runs[0] / FILE, "a") as file:
        file.write(json.dumps(started_again) + "\n")
    (setting,) = group([read_run(run) for run in runs])
    lines = render_origins([setting])
    for machine in ("2 x Some CPU, python 3.12.1", "2 x Some GPU, python", "2 x CPU, python", "not recorded"):
        assert lines[0].count(machine) == 1
    assert lines[0].count("(1 run)") == 4 and "timm" not in lines[0] and "`dmae-ds eval knn`" in lines[1]
    assert lines.count("dmae-ds train first") == 1


def test_every_metric_has_a_command(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    commands = capsys.readouterr().out
    setting = Setting("a", [], {Column(name, "all", "{}"): [1.0] for name in METRICS})
    named = evaluations_of([setting])
    assert len(named) == len(set(named)) and all(f"\n    {name}" in commands for name in named)
