"""Fixtures: scripts of launch/ with stand-ins for the programs that they call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RESULT = {
    "metric": "finetune",
    "scores": {"top1": 94.5},
    "labels": "all",
    "subset_seed": None,
    "settings": {"recipe": "finetune_digits"},
    "step": 5,
    "num_train": 1400,
    "num_val": 397,
    "data": "fingerprint",
    "seconds": 1.5,
    "device": "cpu",
    "world_size": 1,
    "when": "2026-11-01T00:00:00+00:00",
}
PARTS = ("train", "val")
SCORES = {"detect": {"box_ap": 31.5}, "segment": {"miou": 62.5}}
# Records its arguments; `train` makes the run folder, an evaluation of labels adds a result.
PROGRAM = """#!/usr/bin/env bash
echo "${0##*/} $*" >>"$CALLS"
for word in "$@"; do
    case $word in run.dir=*) mkdir -p "${word#*=}" && run=${word#*=} ;; esac
done
[ -z "${BROKEN:-}" ] || [[ "$*" != *"$BROKEN"* ]] || { echo "it broke" >&2; exit 1; }
case "$*" in
*"eval dense"*) echo "$SEGMENTED" >>"$3/results.jsonl" ;;
*"eval finetune"*) mkdir -p "$3/finetune_digits" && echo "$FINETUNED" >>"$3/results.jsonl" ;;
*"eval detect"* | *"eval segment"*)
    distill=false init=weights
    [[ "$*" != *distill.teacher=* ]] || distill=true
    [[ "$*" != *init=random* ]] || init=random
    settings="{\\"distill\\": $distill, \\"init\\": \\"$init\\"}"
    echo "${DENSE/SETTINGS/$settings}" >>"$3/results.jsonl"
    ;;
*digits_g2sd_specific*) echo "$SUPERVISED" >>"$run/results.jsonl" ;;
esac
"""
# The number of GPUs is 0; clipart.py is recorded, programs on standard input are run.
PYTHON = f"""#!/usr/bin/env bash
[ "$1" != -c ] || {{ echo 0; exit 0; }}
[ "$1" != launch/clipart.py ] || {{ echo "${{0##*/}} $*" >>"$CALLS"; exit 0; }}
exec {sys.executable} "$@"
"""


@pytest.fixture
def start(tmp_path):
    """Run a script with the stand-ins; returns the finished process and the recorded commands."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs.parent / "installed").touch()
    for name in ("dmae-ds", "dmae-shards", "deepspeed", "python"):
        (programs / name).write_text(PYTHON if name == "python" else PROGRAM)
        (programs / name).chmod(0o755)
    for part in ("train", "val"):
        (tmp_path / "out" / "images" / part).mkdir(parents=True)
    (tmp_path / "out" / "RESULTS.md").touch()
    (tmp_path / "out" / "scenes").mkdir()
    (tmp_path / "out" / "scenes" / "objectInfo.txt").touch()
    calls = tmp_path / "calls"

    def run(script: str, **variables: str | None) -> tuple[subprocess.CompletedProcess, list[str]]:
        calls.write_text("")
        dense = {"metric": variables.get("TASK"), "scores": SCORES.get(variables.get("TASK"))}
        environment = {
            **os.environ,
            "VENV": str(programs.parent),
            "OUT": str(tmp_path / "out"),
            "CALLS": str(calls),
            "PYTHONPATH": str(LAUNCH.parent),
            "SEGMENTED": json.dumps({**RESULT, "metric": "dense_knn", "scores": {"miou": 12.5}}),
            "FINETUNED": json.dumps(RESULT),
            "DENSE": json.dumps({**RESULT, **dense, "settings": "SETTINGS"}).replace(
                '"SETTINGS"', "SETTINGS"
            ),
            "SUPERVISED": json.dumps({**RESULT, "metric": "supervised", "scores": {"top1": 93.4}}),
            **variables,
        }
        environment["CUDA_VISIBLE_DEVICES"] = None  # set to nothing, torchrun starts the ranks
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(["bash", LAUNCH / script], env=environment, capture_output=True, text=True)
        lines = calls.read_text().replace(f"{tmp_path}/out", "OUT").splitlines()
        return done, [line for line in lines if not line.startswith("dmae-shards")]

    return run


def run_of(call: str) -> str:
    """The name of the run that a training command writes."""
    return next(word for word in call.split() if word.startswith("run.dir=")).rpartition("/")[2]
