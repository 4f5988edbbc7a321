"""Paths, links, commands, options and recipes in every README exist."""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path

import pytest

from data_prep.cli import build_parser as build_shards_parser
from dmae_ds.cli.examples import commands_below
from dmae_ds.cli.main import build_parser

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("dmae_ds", "ds_configs", "data_prep", "launch", "tests")
READMES = sorted(
    [*REPOSITORY.glob("*.md"), *(path for root in ROOTS for path in (REPOSITORY / root).rglob("*.md"))]
)
RECIPES = REPOSITORY / "launch" / "recipes"
TAKE_A_RECIPE = (
    "train",
    "plan",
    "doctor",
    "bench step",
    "bench growth",
    "bench stream",
    "bench cache",
    "bench save",
    "teacher stats",
)
PATH = re.compile(r"(?<![\w/.:-])((?:dmae_ds|ds_configs|data_prep|launch|tests|\.ci|\.github)/[\w./-]*\w)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
# A command, to the end of its line, of its code span, or of the shell command.
COMMAND = re.compile(r"(dmae-ds|dmae-shards|-m dmae_ds|--module dmae_ds) ([^`\n|;#]+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors_of(path: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


@functools.cache
def commands_of(program: str) -> dict[str, argparse.ArgumentParser]:
    """Every command as it is typed after the program's name, and its parser."""
    return commands_below(build_shards_parser() if program == "dmae-shards" else build_parser())


def commands_in(path: Path) -> list[tuple[str, str]]:
    """(program, its arguments) of everything in the code of a page; a trailing backslash joins lines."""
    code = "\n".join(CODE.findall(path.read_text(encoding="utf-8"))).replace("\\\n", " ")
    found = [(match[1], match[2].strip()) for match in COMMAND.finditer(code)]
    return [(("dmae-shards" if program == "dmae-shards" else "dmae-ds"), words) for program, words in found]


def problem_with(program: str, line: str) -> str | None:
    """What is wrong with a command of a README; None where its words, options and recipe exist."""
    words = line.split()
    commands = commands_of(program)
    name, rest = "", words
    while rest and f"{name} {rest[0]}".strip() in commands:
        name, rest = f"{name} {rest[0]}".strip(), rest[1:]
    if not name and words[0] not in ("...", "--help", "--version"):
        return f"{program} {words[0]}: no such command"
    is_group = any(other.startswith(f"{name} ") for other in commands)
    if name and is_group and rest and re.fullmatch(r"[a-z][\w-]*", rest[0]):
        return f"{program} {name} {rest[0]}: no such command"
    options = {option for action in commands[name]._actions for option in action.option_strings}
    for word in rest:
        option = word.split("=")[0].rstrip(".,:")
        if re.fullmatch(r"--[a-z][\w-]*", option) and option not in options:
            return f"{program} {name} {option}: no such option"
    recipe = rest[0] if rest and re.fullmatch(r"[a-z]\w*", rest[0]) else None
    if name in TAKE_A_RECIPE and recipe and not (RECIPES / f"{recipe}.yaml").exists():
        return f"{program} {name} {recipe}: no such recipe"
    return None


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_path_and_link_exists(readme):
    text = readme.read_text(encoding="utf-8")
    missing = {path for path in PATH.findall(text) if not (REPOSITORY / path).exists()}
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (readme.parent / target).resolve() if target else readme
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            missing.add(link)
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_source_file_in_code_exists(readme):
    text = "\n".join(CODE.findall(readme.read_text(encoding="utf-8")))
    named = set(re.findall(r"(?<![\w/.*<-])(\w+\.(?:py|sh|sbatch))\b", text))
    known = {path.name for root in ROOTS for path in (REPOSITORY / root).rglob("*")}
    assert not named - known


@pytest.mark.parametrize("readme", READMES, ids=name_of)
def test_every_command_exists(readme):
    problems = [problem_with(program, line) for program, line in commands_in(readme)]
    assert not [problem for problem in problems if problem]


def test_the_root_readme_shows_the_way_to_imagenet():
    lines = [f"{program} {line}" for program, line in commands_in(REPOSITORY / "README.md")]
    for command in ("dmae-shards make", "dmae-ds plan", "dmae-ds doctor", "dmae-ds train", "dmae-ds eval"):
        assert [line for line in lines if line.startswith(command)], command


@pytest.mark.parametrize(
    "line",
    ["trian x", "train --resum auto", "eval kn RUN", "train no_such_recipe", "teacher slice F --stage 2"],
)
def test_a_wrong_command_is_noticed(line):
    assert problem_with("dmae-ds", line)
