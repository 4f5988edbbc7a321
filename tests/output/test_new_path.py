"""A path that exists is refused, and nobody is told to delete what a command reads."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from dmae_ds.export.early import choose_out
from dmae_ds.tools.checkpoint_find import find_to_convert
from dmae_ds.tools.early import check_slice
from dmae_ds.weights.extract import extract
from tests.messages import refused
from tests.report.made_runs import make_run

# Commands as functions of (what they read, OUT).
WRITE = {
    "export": lambda reads, out: choose_out(reads, to="timm", what="encoder", out=out),
    "convert": find_to_convert,
    "slice": lambda reads, out: check_slice(reads, out, num_stages=1, last_block=None),
    "extract": lambda reads, out: extract(reads / "student.safetensors", "blocks.", out),
}


@pytest.mark.parametrize("where", ["itself", "around", "link", "dangling", "file", "folder"])
@pytest.mark.parametrize("command", WRITE)
def test_what_exists_is_refused(tmp_path, command, where):
    run = make_run(tmp_path / "runs" / "mae", "digits_mae", num_images=1400)
    save_file({"blocks.0": np.zeros(1, np.float32)}, run / "student.safetensors")
    out = {"itself": run, "around": run / "..", "file": run / "config.yaml"}.get(where, tmp_path / where)
    if where == "folder":
        out.mkdir()
    elif where in ("link", "dangling"):
        out.symlink_to(run if where == "link" else tmp_path / "nowhere")
    is_read = where in ("itself", "around", "link")
    with refused(out, "choose another", "is read" if is_read else "delete it") as raised:
        WRITE[command](run, out)
    assert is_read != ("delete" in str(raised.value))
