"""launch/gpu_check.sh rehearsed on a CPU: it writes its two files, and does nothing twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmae_ds.bench import gpu_figures
from dmae_ds.errors import RunFailed, UserError
from tests.messages import refused

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "gpu_check.sh"
STEP = {
    "name": "one",
    "seconds": 0.5,
    "images_per_s": 8.0,
    "of_peak": 0.4,
    "peak_gib": 2.0,
    "predicted_gib": 1.6,
    "parts": {"teacher": {"seconds": 0.1}},
}
MEASURED = {"gemm_gflops": {"bf16": 4.5e5}, "gemm_kernel": {"bf16": "kernel A"}, "steps": [STEP]}


def start(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", SCRIPT, out, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_rehearsal_writes_all_checks_and_figures_into_two_files(tmp_path):
    done = start(tmp_path, "--rehearse")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["rehearsal"] and found["device"] and set(found["versions"]) > {"torch", "deepspeed"}
    assert all(figure["reason"] == "" for figure in found["figures"])
    assert {check["outcome"] for check in found["checks"]} <= {"passed", "skipped"}
    names = " ".join(check["check"] for check in found["checks"])
    for word in ("mocov3_dmae-fp32", "zero3", "pipeline", "reshards", "never_waits", "knn", "bf16_autocast"):
        assert word in names
    for figure in found["figures"]:
        for step in figure.get("steps", []):
            work = sum(part.get("gflop", 0) for part in step["parts"].values())
            assert step["gflop"] == pytest.approx(work) and step["predicted_gib"] > 0
            assert set(step["parts"]) - {"teacher"} == {"prepare", "forward", "backward", "optimizer"}
    page = (tmp_path / "gpu_check.md").read_text()
    assert found["device"] in page and "| teacher fp32 |" in page and "mocov3_dmae-fp32" in page


def test_a_wrong_word_is_refused(tmp_path):
    done = start(tmp_path, "--rehaerse")
    assert done.returncode == 2 and "--rehaerse" in done.stderr


def test_what_has_passed_is_left_out_and_what_failed_is_tried_again(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import os\n"
        "def test_good(record_property):\n"
        "    record_property('loss', 7)\n"
        "def test_bad():\n"
        "    assert os.path.exists('fixed'), 'not yet'\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.record", "-p", "no:cacheprovider"]
    environment = {**os.environ, "GPU_CHECK_OUT": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}

    def run() -> int:
        return subprocess.run(
            [*command, "test_two.py"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        ).returncode

    assert run() == 1
    (tmp_path / "fixed").touch()
    assert run() == 0 and run() == 0
    lines = [json.loads(line) for line in (tmp_path / "correctness.jsonl").read_text().splitlines()]
    assert [(line["check"].split("::")[1], line["outcome"]) for line in lines] == [
        ("test_good", "passed"),
        ("test_bad", "failed"),
        ("test_bad", "passed"),
    ]
    assert lines[0]["measured"] == {"loss": 7} and "not yet" in lines[1]["reason"]


def test_a_figure_that_breaks_costs_no_other_and_is_tried_again(tmp_path, monkeypatch):
    broken, calls = [True], []

    def measure_steps(recipes, *_, **options):
        calls.append(recipes["recipe"].teacher.dtype)
        if calls[-1] == "fp32" and broken[0]:
            raise RuntimeError("out of memory\nat some place")
        return MEASURED

    monkeypatch.setattr(gpu_figures, "measure_steps", measure_steps)
    monkeypatch.setattr(gpu_figures, "bench_knn", lambda **_: "a\nb\n7 s\nd")
    with refused("1 of 4", "teacher fp32", "out of memory", error=RunFailed):
        gpu_figures.measure_gpu(tmp_path, rehearse=True)
    assert calls == ["bf16", "bf16", "fp32"]
    assert "out of memory" in (tmp_path / "gpu_check.md").read_text()
    broken[0] = False
    gpu_figures.measure_gpu(tmp_path, rehearse=True)
    assert calls == ["bf16", "bf16", "fp32", "fp32"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert "out of memory" not in page and "kernel A" in page and "7 s" in page
    row = next(line for line in page.splitlines() if line.startswith("| teacher fp32 |"))
    assert [cell.strip() for cell in row.split("|")[5:11]] == ["8", "40%", "20%", "2.00", "1.60", "1.250"]


def test_figures_that_a_gpu_cannot_have_are_no_failure(tmp_path, monkeypatch):
    def measure_steps(recipes, *_, **options):
        raise UserError("teacher.dtype fp8 needs another GPU")

    monkeypatch.setattr(gpu_figures, "measure_steps", measure_steps)
    monkeypatch.setattr(gpu_figures, "bench_knn", lambda **_: "a\nb\n7 s\nd")
    gpu_figures.measure_gpu(tmp_path, rehearse=True)
    assert "needs another GPU" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.skipif(gpu_figures.torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_rehearsal_runs(tmp_path):
    with refused("GPU", "--rehearse"):
        gpu_figures.measure_gpu(tmp_path, rehearse=False)


def requirements_of(names: set[str]) -> set[str]:
    """These packages and all that they require, as installed here."""
    found, todo = set(), list(names)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        requirements = [Requirement(line) for line in lines]
        todo += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def test_the_list_of_wheels_holds_whatever_the_check_needs_next_to_torch_and_timm():
    lines = (REPOSITORY / "launch" / "wheels.txt").read_text().splitlines()
    listed = {canonicalize_name(Requirement(line).name) for line in lines if not line.startswith("#")}
    there = requirements_of({"torch", "timm", "torchvision"})
    wanted = {
        "accelerate",
        "deepspeed",
        "isal",
        "pydantic",
        "pytest",
        "scikit-learn",
        "simplejpeg",
        "webdataset",
    }
    assert not requirements_of(wanted) - there - listed
