"""Help pages of every command, exit codes, and options under their old names."""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
import sys

import pytest

from data_prep import cli
from dmae_ds.cli.arguments import at_least_one
from dmae_ds.cli.examples import EXAMPLES, commands_below
from dmae_ds.cli.main import GROUPS, build_parser, main
from dmae_ds.errors import Requeue, RunFailed, UserError
from tests.messages import banned_words

COMMANDS = commands_below(build_parser())
ALONE = [
    name for name in COMMANDS if not any(other.startswith(f"{name} ".lstrip()) for other in COMMANDS if other)
]
SHARD_COMMANDS = {
    f"dmae-shards {name}": parser for name, parser in commands_below(cli.build_parser()).items()
}


def test_the_commands_are_those_of_the_table():
    assert set(GROUPS) == {name for name in COMMANDS if name and " " not in name}
    assert {"train", "eval knn", "teacher slice", "checkpoint verify", "bench step"} <= set(COMMANDS)
    assert len(COMMANDS) > 20


def test_every_help_page_is_shown_without_torch():
    program = (
        "import sys\n"
        "from dmae_ds.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        main([*name.split(), '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, name\n"
        "assert main(['recipes']) == 0\n"
        "heavy = {'torch', 'timm', 'deepspeed', 'accelerate', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *COMMANDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: dmae-ds") == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_in_plain_words(name):
    command = COMMANDS[name]
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        assert action.help, f"{action.dest} has no help"
    assert not banned_words(command.format_help())


def test_every_command_has_examples_that_it_takes():
    assert sorted(EXAMPLES) == sorted(ALONE)
    root = build_parser()
    for name, examples in EXAMPLES.items():
        for example in examples:
            assert f"dmae-ds {name} {example}".rstrip() in COMMANDS[name].format_help()
            args, extra = root.parse_known_args([*name.split(), *shlex.split(example)])
            assert hasattr(args, "overrides") or not extra
            assert not [word for word in extra if word.startswith("-")]


@pytest.mark.parametrize("name", [*COMMANDS, *SHARD_COMMANDS])
def test_a_default_in_a_help_text_is_the_option_s(name):
    for action in {**COMMANDS, **SHARD_COMMANDS}[name]._actions:
        told = re.search(r"default ([^;:)]+)", (action.help or "").replace("%%", "%"))
        if told is None or action.default is None:
            continue
        values = action.default if isinstance(action.default, list) else [action.default]
        words = told[1].split(", ")[0].replace(",", "").split()
        assert list(map(number_or_text, words)) == list(map(number_or_text, values)), action.option_strings


def number_or_text(value: object) -> object:
    try:
        return float(value)
    except ValueError:
        return value


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("x"), 2), (RunFailed("x"), 1), (Requeue("x"), 75)],
    ids=["mistake", "broken", "stopped"],
)
def test_an_error_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr("dmae_ds.cli.plan._plan", fail)
    assert main(["plan", "digits_dmae"]) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("dmae-ds: ") and "x" in line
    assert ("stopped" in line) == (code == 75)


@pytest.mark.parametrize(
    ("rank", "everywhere", "printed"), [(0, True, True), (1, True, False), (1, False, True)]
)
def test_an_error_of_all_ranks_is_printed_by_one(monkeypatch, capsys, rank, everywhere, printed):
    def fail(args):
        error = UserError("x")
        error.on_every_rank = everywhere
        raise error

    monkeypatch.setattr("dmae_ds.cli.plan._plan", fail)
    monkeypatch.setenv("RANK", str(rank))
    assert main(["plan", "digits_dmae"]) == 2
    line = capsys.readouterr().err
    assert bool(line) == printed
    assert ("(rank 1)" in line) == (rank == 1 and printed)


def test_overrides_may_stand_behind_an_option(monkeypatch):
    parsed = []
    monkeypatch.setattr("dmae_ds.cli.train._train", parsed.append)
    assert main(["--local_rank=1", "train", "digits_dmae", "--resume", "auto", "optim.epochs=2"]) == 0
    (args,) = parsed
    assert args.overrides == ["optim.epochs=2"] and args.resume == "auto"
    with pytest.raises(SystemExit) as end:
        main(["train", "digits_dmae", "--no-such-option"])
    assert end.value.code == 2


def test_a_recipe_is_asked_for_and_the_objectives_are_listed(capsys):
    assert main(["train"]) == 2
    output = capsys.readouterr()
    assert "dmae_vit_large_to_base" in output.out
    assert "recipe" in output.err


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "many"])
def test_a_count_is_at_least_one(text):
    assert at_least_one("3") == 3
    with pytest.raises(argparse.ArgumentTypeError):
        at_least_one(text)


@pytest.mark.parametrize("text", ["0", "nan", "abc"])
def test_epochs_of_distill_are_a_number_above_0(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["distill", "folder", "--teacher", "t", "--student", "s", "--epochs", text])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{text} is not a number" in error and "_positive" not in error


def test_a_reader_that_has_seen_enough_is_no_error(digits):
    for words in (["dmae_ds", "recipes", "--all"], ["data_prep.cli", "info", str(digits / "val")]):
        process = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        process.stdout.close()
        assert process.communicate()[1] == ""
        assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "program, words, named",
    [
        (main, ["eval", "knn", "--k", "5", "20", "RUN"], ["--k", "'RUN'", "eval knn --help"]),
        (main, ["eval", "probe", "--labels", "1%", "/tmp"], ["--labels", "'/tmp'", "eval probe --help"]),
        (main, ["eval", "segment"], ["RUN|FILE", "eval segment --help"]),
        (main, ["tarin"], ["'tarin'", "train", "dmae-ds --help"]),
        (main, ["plan", "mae_vit_base", "--gpu-s", "2"], ["--gpu-s", "dmae-ds"]),
        (main, ["export", "runs/dmae"], ["--to", "export --help"]),
        (cli.main, ["mkae"], ["'mkae'", "make", "dmae-shards --help"]),
        (cli.main, ["make", "src", "dst", "--workers", "none"], ["--workers", "none", "make --help"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(program, words, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        program(words)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1
    assert all(word in lines[0] for word in named)
