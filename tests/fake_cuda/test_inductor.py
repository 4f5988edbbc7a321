"""Every kind of transformer block lowers to Triton for compute capability 9.0, without a device.

torch.compile's own capture is not run (a graph is captured by make_fx), and nothing is said about speed. The
interfaces are private ones of torch, so a new torch may need changes here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_block_lowers_to_triton_kernels(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.fake_cuda.inductor_driver"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: count for line in lines for name, count in json.loads(line[7:]).items()}
    assert len(found) == 6
    # Products and attention are library calls; what lies between them is fused.
    assert all(3 <= kernels <= 30 for kernels in found.values()), found
    assert found["teacher ViT-L, bf16"] < found["student ViT-B, bf16"] < found["student ViT-B, autocast"]
