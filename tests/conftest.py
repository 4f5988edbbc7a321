"""Fixtures that several rooms' tests share: the published numbers, and a small real data set as shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of numbers computed with the published implementations; it lies beside the checkout."""
    folder = Path(os.environ.get("DMAE_DS_ORACLES", REPOSITORY.parent / "shared" / "oracles"))
    if folder.is_dir():
        return folder
    message = f"NOT CHECKED AGAINST THE PUBLISHED CODE: no folder {folder}; set DMAE_DS_ORACLES to where the oracles are"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits as shards: the folder holds `train` (1,400 images) and `val` (397)."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, REPOSITORY / "launch" / "digits.py", folder / "images"], check=True, capture_output=True)
    for part in ("train", "val"):
        command = [sys.executable, "-m", "data_prep.cli", "make", folder / "images" / part, folder / part, "--samples-per-shard", "500"]
        subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
    return folder
