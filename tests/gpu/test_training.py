"""What a GPU computes is what the CPU computes: every objective, precision, ZeRO stage, resume, reshard."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.metrics import MetricLogger
from tests.gpu.conftest import NAMES, NUM_STEPS, REHEARSAL
from tests.train.conftest import losses

pytestmark = pytest.mark.gpu
TOLERANCES = {"fp32": 1e-3, "bf16_autocast": 2e-2, "bf16": 2e-2, "fp16": 2e-2}  # of the mean over the steps
PRECISIONS = [(name, precision) for name in NAMES for precision in TOLERANCES]
STAGES = ["zero0", "zero1", "zero3", "zero3_offload"]
if REHEARSAL:
    PRECISIONS = [(name, "fp32") for name in NAMES] + [("dmae", "bf16_autocast"), ("mae", "bf16")]
    STAGES = ["zero0", "zero3"]
OTHER_STAGES = STAGES[:3]
HALF = NUM_STEPS // 2
SAVED = [f"checkpoint.every_steps={HALF}", "checkpoint.keep=9"]


def difference(found: list[float], expected: list[float]) -> float:
    """Mean over the steps of the relative difference."""
    assert len(found) == len(expected) > 0
    return sum(abs(one / other - 1) for one, other in zip(found, expected, strict=True)) / len(found)


@pytest.mark.parametrize("objective, precision", PRECISIONS)
def test_losses_are_those_of_the_cpu(train, reference, record_property, objective, precision):
    found = train(objective, "deepspeed=zero2", f"precision={precision}")
    away = difference(found, losses(reference(objective)))
    record_property("losses away from the CPU's fp32", f"{away:.1e}")
    assert away < TOLERANCES[precision]


@pytest.mark.parametrize(
    "changes",
    [
        *([f"deepspeed={stage}"] for stage in STAGES),
        ["deepspeed=zero2", "teacher.placement=pipeline", "teacher.stages=1"],
        ["deepspeed=zero2", "teacher.placement=zero3"],
        pytest.param(
            ["deepspeed=zero2", "compile=true"],
            marks=pytest.mark.skipif(REHEARSAL, reason="compiling takes a minute"),
        ),
    ],
    ids=lambda changes: ",".join(changes),
)
def test_losses_stay_under_other_engines_and_placements(train, reference, record_property, changes):
    away = difference(train("dmae", *changes), losses(reference("dmae")))
    record_property("losses away from the CPU's", f"{away:.1e}")
    assert away < TOLERANCES["fp32"]


def test_resumes_and_reshards_continue_with_the_same_losses(train, device, record_property):
    whole = train("dmae", "deepspeed=zero2", *SAVED)
    resumed = train("dmae", "deepspeed=zero2", *SAVED, name="same", resume=("run", HALF))
    record_property("the same run again, bit for bit", str(resumed == whole[HALF:]))
    assert difference(resumed, whole[HALF:]) < 1e-3
    assert device.type == "cuda" or resumed == whole[HALF:]
    for stage in OTHER_STAGES:
        moved = train("dmae", f"deepspeed={stage}", *SAVED, name=stage, resume=("run", HALF))
        away = difference(moved, whole[HALF:])
        record_property(f"zero2 -> {stage}, losses away", f"{away:.1e}")
        assert away < 1e-3


@pytest.mark.parametrize("stage", STAGES[: 1 if REHEARSAL else 2])
def test_the_host_never_waits_between_log_lines(train, device, monkeypatch, stage):
    """From the third step on, torch raises an error where the host would wait for the device."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)

    @contextlib.contextmanager
    def allowed():
        before = modes[-1]
        set_mode("default")
        yield
        set_mode(before)

    def allowing(method):
        def wrapped(*args, **kwargs):
            with allowed():
                return method(*args, **kwargs)

        return wrapped

    def end_step(self, step, lr, original=MetricLogger.end_step):
        original(self, step, lr)
        if step >= 2:
            set_mode("error")

    set_mode("default")
    monkeypatch.setattr(MetricLogger, "end_step", end_step)
    monkeypatch.setattr(MetricLogger, "flush", allowing(MetricLogger.flush))
    monkeypatch.setattr(Checkpoints, "save", allowing(Checkpoints.save))
    try:
        train("dmae", f"deepspeed={stage}", "log.every_steps=10")
        assert modes.count("error") >= NUM_STEPS - 1
    finally:
        set_mode("default")
