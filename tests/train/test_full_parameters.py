"""Full weights are DeepSpeed's own to the last bit, in a collective a bucket."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.conftest import deepspeed, run

# 35, 7, 21, 3, 1 and 1 entries, in buckets of 40 at most.
NUM_BUCKETS = 2


@pytest.mark.slow
def test_full_weights_are_deepspeeds_own_under_every_stage(tmp_path):
    driver = Path(__file__).with_name("full_parameters_driver.py")
    done = run([*deepspeed(2), str(driver)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("SAME ")]
    found = {(stage, precision): int(calls) for stage, precision, calls in rows}
    assert len(found) == 7
    for (stage, precision), calls in found.items():
        sends = stage == "3" or (stage != "0" and precision == "bf16")
        assert calls == (NUM_BUCKETS if sends else 0), (stage, precision)
