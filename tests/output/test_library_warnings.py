"""Warnings of libraries do not reach users; those of this program do."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from data_prep import cli
from dmae_ds.output import library_warnings
from tests.train.conftest import environment

SHOW = """
import sys, warnings
from {module} import main
for _ in range(2):
    try:
        main(["--help"])
    except SystemExit:
        pass
warnings.warn_explicit("of torch", FutureWarning, "/venv/lib/python3.11/site-packages/torch/x.py", 1)
warnings.warn_explicit("of PIL", UserWarning, "/usr/lib/python3/dist-packages/PIL/Image.py", 1)
warnings.warn_explicit("of a script", UserWarning, "/home/me/teacher.py", 1)
"""


@pytest.mark.parametrize(
    "options, shown",
    [([], ["of a script"]), (["-W", "default"], ["of torch", "of PIL", "of a script"])],
)
@pytest.mark.parametrize("module", ["dmae_ds.cli.main", "data_prep.cli"])
def test_only_warnings_of_libraries_are_hidden_unless_asked_for(module, options, shown):
    env = {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, *options, "-c", SHOW.format(module=module)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert [text for text in ("of torch", "of PIL", "of a script") if text in done.stderr] == shown


@pytest.mark.parametrize(
    "filename, is_library",
    [
        ("/venv/lib/python3.11/site-packages/torch/x.py", True),
        ("/usr/lib/python3/dist-packages/PIL/Image.py", True),
        ("<frozen importlib._bootstrap>", True),
        (library_warnings.__file__, False),
        (cli.__file__, False),
        (warnings.__file__, True),
        ("/home/me/site-packages-notes/run.py", False),
    ],
)
def test_the_place_of_a_warning_decides(filename, is_library):
    assert library_warnings.is_of_library(filename) == is_library
