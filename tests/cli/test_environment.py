"""The command sets variables that torch reads when it is loaded, unless someone has set them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dmae_ds.cli.environment import SPINS
from dmae_ds.cli.main import main

# OpenMP's library, as torch brings it, prints how it was set up when it was loaded.
LOAD_OPENMP = """
import ctypes, importlib.util, pathlib, sys
from dmae_ds.cli.main import main
assert main(["train", "no_such_recipe"]) == 2 and "torch" not in sys.modules
package = pathlib.Path(importlib.util.find_spec("torch").origin).parent
for folder in (package / "lib", package.parent / "torch.libs"):
    for library in folder.glob("libgomp*"):
        ctypes.CDLL(str(library))
"""


@pytest.mark.parametrize(
    "chosen, spins",
    [({}, SPINS), ({"OMP_WAIT_POLICY": "passive"}, "0"), ({"GOMP_SPINCOUNT": "70"}, "70")],
)
def test_threads_spin_for_a_moment_unless_someone_chose(chosen, spins):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **chosen}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_OPENMP], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_gpu_memory_comes_in_segments_that_grow_unless_someone_chose(monkeypatch, chosen, expected, capsys):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", {**os.environ, **chosen})
    assert main(["train", "no_such_recipe"]) == 2
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
