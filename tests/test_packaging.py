"""The installed package works from any folder, with its recipes and DeepSpeed files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dmae_ds.cli.launch_files import FILES
from dmae_ds.config.shipped import shipped_files

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which a copy of the checkout was installed by pip."""
    source, target = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("site")
    unwanted = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=unwanted)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def run_installed(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )


def test_every_recipe_and_deepspeed_file_is_found(installed, tmp_path):
    code = (
        "import dmae_ds.config.shipped as shipped\n"
        "print(shipped.__file__)\n"
        "print(*shipped.shipped_files('recipe'), *shipped.shipped_files('DeepSpeed file'))\n"
    )
    done = run_installed(installed, tmp_path, sys.executable, "-c", code)
    where, *names = done.stdout.split()
    assert Path(where).is_relative_to(installed)
    assert names == [*shipped_files("recipe"), *shipped_files("DeepSpeed file")]
    assert len(names) > 10
    assert (installed / "dmae_ds" / "report" / "published.json").is_file()


def test_nothing_but_the_two_packages_is_installed(installed):
    assert {
        path.name for path in installed.iterdir() if path.is_dir() and not path.name.endswith(".dist-info")
    } == {"dmae_ds", "data_prep", "bin"}


@pytest.mark.parametrize("program", ["dmae-ds", "dmae-shards"])
def test_both_commands_start_from_any_folder(installed, tmp_path, program):
    done = run_installed(installed, tmp_path, str(installed / "bin" / program), "--help")
    assert done.returncode == 0, done.stderr
    assert program in done.stdout


def test_the_launchers_are_installed(installed, tmp_path):
    done = run_installed(installed, tmp_path, str(installed / "bin" / "dmae-ds"), "launch-files", ".")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "launch").iterdir()} == set(FILES)
    assert (tmp_path / "launch" / "train.sh").read_bytes() == (REPOSITORY / "launch/train.sh").read_bytes()
    assert {path.name for path in (installed / "dmae_ds" / "shipped_launch").iterdir()} >= set(FILES)
