"""A teacher cut into stages over real ranks gives the replicated teacher's features, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.train.conftest import LIMIT_S, environment, free_port

PLAIN = {
    "name": "vit_tiny_patch16_224",
    "shape": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2},
    "depth": 8,
    "file": "plain",
}
ROTARY = {
    "name": "vit_small_patch16_dinov3",
    "shape": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "depth": 4,
    "file": "rotary",
}
POOLED = {
    "name": "vit_pe_core_tiny_patch16_384",
    "shape": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2},
    "depth": 4,
    "file": "pooled",
}
BASE = {"stages": 1, "taps": ["block/6"], "sizes": [4, 4, 4], "sees": "visible", "dtype": "fp32"}
CASES = [
    {**PLAIN, **BASE},
    # Groups of 2 in a world of 4; a smaller last batch.
    {**PLAIN, **BASE, "stages": 2, "sizes": [4, 4, 4, 4, 3]},
    {**PLAIN, **BASE, "stages": 4, "sizes": [4, 4, 4, 4, 4, 4, 1]},
    # Two taps, one of them on an inner stage; fewer batches than stages.
    {**PLAIN, **BASE, "stages": 4, "taps": ["block/3", "block/6"]},
    # Owners' borders differ; a single batch.
    {**PLAIN, **BASE, "stages": 4, "taps": ["block/5"], "sizes": [2]},
    # The tapped block 4 is on either stage, by owner.
    {**PLAIN, **BASE, "stages": 2, "taps": ["block/4", "block/7"], "sizes": [2] * 6},
    {**PLAIN, **BASE, "stages": 2, "taps": ["block/1", "block/7"], "dtype": "bf16", "sees": "all"},
    # Registers, and rotary angles, which need patch ids on every stage.
    {**ROTARY, **BASE, "stages": 4, "taps": ["block/4", "block/2"], "sizes": [3, 3, 2]},
    # The output, and relations, of which the last block is not run; a tap's tokens have widths of their own.
    {**ROTARY, **BASE, "stages": 4, "taps": ["relation/3", "tokens", "cls"], "sizes": [3, 2]},
    {**PLAIN, **BASE, "stages": 2, "taps": ["relation/8", "block/5"], "sizes": [2, 2, 1]},
    {**POOLED, **BASE, "stages": 2, "taps": ["pooled", "tokens"], "sees": "all", "sizes": [2, 1]},
    {**PLAIN, **BASE, "stages": 2, "taps": ["block/5"], "sees": "superset", "mask_ratio": 0.5},
    {**ROTARY, **BASE, "stages": None, "taps": ["relation/4", "relation/1"], "sizes": [2, 1]},
    {**POOLED, **BASE, "stages": None, "taps": ["pooled", "cls", "relation/4"], "sizes": [2]},
    # No stages: sharded over all ranks by ZeRO-3.
    {**PLAIN, **BASE, "stages": None, "taps": ["block/3", "block/6"], "sizes": [4, 4, 1]},
    {**ROTARY, **BASE, "stages": None, "taps": ["block/4"], "dtype": "bf16", "sizes": [3]},
]
# Several teachers: one in stages and one replicated, or stages of different lengths and one sharded.
SEVERAL = [
    {
        "a": {**PLAIN, **BASE, "stages": 2, "sizes": [3, 3, 3, 3, 2]},
        "b": {**ROTARY, **BASE, "stages": 0, "taps": ["tokens", "cls"], "sees": "all"},
    },
    {
        "a": {**PLAIN, **BASE, "stages": 4, "sizes": [2] * 12 + [1]},
        "b": {**ROTARY, **BASE, "stages": None, "taps": ["block/4"]},
        "c": {**PLAIN, **BASE, "stages": 2, "taps": ["block/3"], "dtype": "bf16"},
    },
]
CASES += [{"several": case} for case in SEVERAL]


def name_of(number: int) -> str:
    """The stages of a case, its taps and its file; of several teachers their stages."""
    case = CASES[number]
    if "several" in case:
        return "several-" + "+".join(str(one["stages"]) for one in case["several"].values())
    return f"P{case['stages'] or '-zero3'}-{'+'.join(case['taps'])}-{case['file']}"


def start(folder: Path, cases: list[dict], *, schedules: int) -> str:
    """Output of four ranks."""
    torch.manual_seed(0)
    for network in (PLAIN, ROTARY, POOLED):
        state = timm.create_model(network["name"], num_classes=0, **network["shape"]).state_dict()
        save_file(
            {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()},
            folder / f"{network['file']}.safetensors",
        )
    driver = Path(__file__).with_name("stream_driver.py")
    launch = [sys.executable, "-m", "torch.distributed.run"]
    ranks = ["--nproc_per_node", "4", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launch, *ranks, str(driver), str(folder), json.dumps(cases), str(schedules)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.stdout + done.stderr[-3000:]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> str:
    """Output of four ranks, started once for all cases."""
    return start(tmp_path_factory.mktemp("stream"), CASES, schedules=5)


def test_five_random_schedules_neither_hang_nor_differ(answers):
    assert "SCHEDULES 5\n" in answers, answers


@pytest.mark.slow
def test_three_hundred_random_schedules_neither_hang_nor_differ(tmp_path):
    answers = start(tmp_path, [], schedules=300)
    assert "SCHEDULES 300\n" in answers, answers


@pytest.mark.parametrize(
    "number",
    range(len(CASES)),
    ids=name_of,
)
def test_streamed_features_are_those_of_the_replicated_teacher(answers, number):
    assert f"EQUAL {number}\n" in answers, answers
