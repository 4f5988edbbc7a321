"""Layout of the repository: ruff, lengths of lines, files and functions, loose files, words, READMEs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.messages import banned_words

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = ("dmae_ds", "data_prep", "ds_configs", "launch", "tests")
SUFFIXES = {".py", ".sh", ".yaml", ".json", ".sbatch", ".md"}

MAX_LINE = 120  # the formatter folds at 110
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80
MANY_PARAMETERS = 10
MAX_WITH_MANY_PARAMETERS = 3
MAX_PARAMETERS = 14
MAX_LOOSE_FILES = 4
MAX_ROOMS = 24
MIN_TESTS_PER_SOURCE = 0.7
MAX_ROOT_README_BYTES = 10_000

ROOMS_WITH_A_README = [
    "data_prep",
    "dmae_ds/bench",
    "dmae_ds/config",
    "dmae_ds/data",
    "dmae_ds/dense",
    "dmae_ds/distill",
    "dmae_ds/doctor",
    "dmae_ds/evaluate",
    "dmae_ds/export",
    "dmae_ds/finetune",
    "dmae_ds/objectives",
    "dmae_ds/plan",
    "dmae_ds/teacher",
    "dmae_ds/train",
    "dmae_ds/weights",
    "launch",
]
# Names that files had before, and under which they are still read.
OLD_NAMES = ("twin.safetensors",)


def all_files() -> list[Path]:
    files = [path for root in ROOTS for path in (REPOSITORY / root).rglob("*") if path.suffix in SUFFIXES]
    return sorted([*files, *REPOSITORY.glob("*.md"), REPOSITORY / "setup.cfg", REPOSITORY / "pyproject.toml"])


FILES = all_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]
ROOMS = sorted(path.parent for path in (REPOSITORY / "dmae_ds").glob("*/__init__.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("arguments", [["format", "--check"], ["check"]], ids=["format", "check"])
def test_ruff_has_nothing_to_change(arguments):
    if importlib.util.find_spec("ruff") is None:
        pytest.fail("ruff is not installed; run `pip install -e '.[test]'`")
    command = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--quiet", "."]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, f"run `ruff {arguments[0]} .`\n{done.stdout}{done.stderr}"


def test_no_line_is_wide_and_none_is_kept_from_the_formatter():
    skip = re.compile(r"#\s*fmt:\s*(skip|off)")
    bad = []
    for path in PYTHON:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if len(line) > MAX_LINE or skip.search(line):
                bad.append(f"{name_of(path)}:{number}")
    assert not bad


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def test_functions_are_short_and_take_few_parameters():
    long, many = {}, {}
    for path in PYTHON:
        for function in functions_of(path):
            place = f"{name_of(path)}:{function.lineno} {function.name}"
            length = function.end_lineno - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                long[place] = length
            arguments = function.args
            num = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            if num >= MANY_PARAMETERS:
                many[place] = num
    assert not long
    assert len(many) <= MAX_WITH_MANY_PARAMETERS and max(many.values(), default=0) <= MAX_PARAMETERS, many


def test_the_package_has_few_rooms_and_few_loose_files():
    assert len(list((REPOSITORY / "dmae_ds").glob("*.py"))) <= MAX_LOOSE_FILES
    assert 10 < len(ROOMS) <= MAX_ROOMS


def test_there_are_enough_lines_of_tests():
    def num_lines(paths: list[Path]) -> int:
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)

    tests = [path for path in PYTHON if path.is_relative_to(REPOSITORY / "tests")]
    source = [path for path in PYTHON if path not in tests]
    assert num_lines(tests) >= MIN_TESTS_PER_SOURCE * num_lines(source)


def test_words_are_plain():
    bad = []
    for path in FILES:
        if path.name == "messages.py" and path.parent.name == "tests":
            continue  # the list of these words
        text = path.read_text(encoding="utf-8")
        for name in OLD_NAMES:
            text = text.replace(name, "")
        bad += [
            f"{name_of(path)}:{number} {words}"
            for number, line in enumerate(text.splitlines(), start=1)
            if (words := banned_words(line))
        ]
    assert not bad, "\n".join(bad)


def test_the_root_readme_is_short_and_names_every_room():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= MAX_ROOT_README_BYTES
    rooms = [f"dmae_ds/{room.name}" for room in ROOMS] + ["data_prep", "ds_configs", "launch", "tests"]
    assert not [room for room in rooms if not re.search(rf"`{room}/?`|\]\({room}/", text)]


@pytest.mark.parametrize("room", ROOMS_WITH_A_README)
def test_every_room_that_users_touch_has_a_readme(room):
    readme = REPOSITORY / room / "README.md"
    assert readme.is_file()
    assert 1000 <= len(readme.read_bytes()) <= 6144
    first = readme.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
