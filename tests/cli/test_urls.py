"""A URL where a file or folder of this machine is meant: one line, for every argument and every key."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from data_prep.cli import build_parser as build_shard_parser
from data_prep.cli import main as shard_main
from dmae_ds.cli.examples import commands_below
from dmae_ds.cli.main import main
from dmae_ds.config.evaluation import FinetuneConfig
from dmae_ds.config.load import TAKES_URL, flatten, load_config
from dmae_ds.output.local_path import looks_like_url
from tests.cli.test_help import COMMANDS
from tests.messages import refused

URL = "s3://bucket/folder"
SHARDS = {name: command for name, command in commands_below(build_shard_parser()).items() if name}
TAKES_ONE = {("make", "dst"), ("verify", "dst"), ("info", "dst"), ("index", "tars")}


def arguments(command: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments that may be a file or folder."""
    return [
        action
        for action in command._actions
        if action.nargs != 0
        and action.choices is None
        and action.dest not in ("overrides", "license")
        and (action.type in (None, Path) or getattr(action.type, "__name__", "") == "_place")
    ]


def typed(command: argparse.ArgumentParser, chosen: argparse.Action) -> list[str]:
    """A command line with the URL for one argument, and a word for every other that is required."""
    words = []
    for action in command._actions:
        word = action.choices[0] if action.choices else "word"
        if action is chosen:
            word = URL
        elif not action.required:
            continue
        words += [*action.option_strings[-1:], word]
    return words


ALL = [
    (program, name, action)
    for program, commands in ((main, COMMANDS), (shard_main, SHARDS))
    for name, command in commands.items()
    if name and len(commands_below(command)) == 1
    for action in arguments(command)
]


def test_arguments_are_found():
    found = {(name, action.dest) for _, name, action in ALL}
    assert {
        ("train", "recipe"),
        ("export", "out"),
        ("eval knn", "runs"),
        ("make", "src"),
    } | TAKES_ONE <= found


@pytest.mark.parametrize(
    ("program", "name", "action"),
    [each for each in ALL if (each[1], each[2].dest) not in TAKES_ONE],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "dest", ""),
)
def test_a_url_is_refused_for_every_argument(program, name, action, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (COMMANDS if program is main else SHARDS)[name]
    assert program([*name.split(), *typed(command, action)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and URL in line and "URL" in line
    assert not list(tmp_path.iterdir())


def test_a_url_is_refused_for_every_key_that_means_a_file(tmp_path):
    keys = ["run.dir", "data.cache_dir", "deepspeed", "student.weights", "teacher.weights", "teacher.stats"]
    for key in keys:
        extra = ["teacher.standardize=zscore"] if key == "teacher.stats" else []
        with refused(key, URL):
            load_config("digits_dmae", [*extra, f"{key}={URL}"])
    given = ["run.dir=x", "data.train=x", "network.name=vit_tiny_patch16_224", "weights=x"]
    with refused("weights", URL):
        load_config(
            "finetune_mae", [*given, f"weights={URL}"], schema=FinetuneConfig, kind="evaluation recipe"
        )
    config = load_config("digits_dmae", [f"data.train={URL}", f"data.val={URL}"])
    assert config.data.train == config.data.val == URL
    assert sum(TAKES_URL.fullmatch(key) is not None for key in flatten(config.model_dump())) > 4
    stored = load_config("digits_dmae", ["teacher.placement=cache", f"teacher.cache={URL}"])
    assert stored.teacher.cache == URL


def test_what_a_url_is():
    assert all(map(looks_like_url, (URL, Path(URL), "https://x", "file:///x", "az:/x")))
    assert not any(map(looks_like_url, ("runs/x", "C:/x", "my.module:build", "data.train=s3://x", "host:2")))
