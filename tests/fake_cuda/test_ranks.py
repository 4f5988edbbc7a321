"""What a rank of 8 waits for and sends in a step, under DeepSpeed's real ZeRO on fake CUDA.

The table is expected.json: exactly these waits, by the function that waits, and these collectives. A new
DeepSpeed that begins to wait, or a change that sends more, shows as a difference. After a change that is
meant, write it again, and read what changed:

    python -m tests.fake_cuda.test_ranks [CASE ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("expected.json")
EXPECTED: dict[str, dict] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
DMAE = "dmae_vit_large_to_base"
SMALL = ["optim.global_batch=64", "optim.micro_batch=4"]  # two micro-batches a rank; as many kernels as of 64


def job_of(case: str) -> dict:
    """A job of the driver.

    case: "RECIPE PRECISION DEEPSPEED", with "whole" in the recipe's own batch; "pipeline RECIPE STAGES"; or
      "zero3_teacher DTYPE"
    """
    first, *words = case.split()
    if first == "pipeline":
        recipe, stages = words
        placed = ["teacher.placement=pipeline", f"teacher.stages={stages}", "teacher.dtype=bf16"]
        return {"run": first, "recipe": recipe, "overrides": placed, "stages": int(stages)}
    if first == "zero3_teacher":
        return {"run": first, "overrides": [f"teacher.dtype={words[0]}"]}
    precision, deepspeed, *whole = words
    batch = [] if whole else SMALL
    return {
        "run": "engine",
        "recipe": first,
        "overrides": [f"precision={precision}", f"deepspeed={deepspeed}", *batch],
    }


FAST = [
    f"{DMAE} bf16_autocast zero0",
    f"{DMAE} bf16_autocast zero1",
    f"{DMAE} bf16_autocast zero2",
    f"pipeline {DMAE} 2",
    "zero3_teacher bf16",
]
SHIPPED = [f"{DMAE} bf16_autocast zero1 whole", f"{DMAE} bf16_autocast zero2 whole"]
SLOW = [
    *SHIPPED,
    f"{DMAE} fp32 zero0",
    *(f"{DMAE} {precision} zero1" for precision in ("fp32", "bf16", "fp16")),
    *(f"{DMAE} {precision} zero2" for precision in ("fp32", "bf16", "fp16")),
    *(f"{DMAE} {precision} zero3" for precision in ("fp32", "bf16_autocast", "bf16")),
    *(f"{DMAE} {precision} zero3_offload" for precision in ("fp32", "bf16")),
    *(f"dino_vit_base bf16_autocast {zero}" for zero in ("zero1", "zero2")),
    *(f"sdae_vit_base bf16 {zero}" for zero in ("zero1", "zero2", "zero3")),
    *(f"mocov3_dmae_vit_base bf16_autocast {zero} whole" for zero in ("zero1", "zero2", "zero3")),
    "g2sd_specific_from_scratch bf16_autocast zero2",
    *(f"tinymim_vit_large_to_base bf16_autocast {zero}" for zero in ("zero2", "zero3")),
    *(f"amd_vit_base_to_small bf16 {zero}" for zero in ("zero1", "zero3")),
    "pipeline dmae_vit_huge_to_base 4",
    "pipeline dmae_dinov2_large_to_base 4",
    "pipeline g2sd_generic_vit_base_to_small 2",
    "pipeline mocov3_dmae_vit_base 2",
    "pipeline tinymim_vit_large_to_base 4",
    "pipeline amd_vit_base_to_small 2",
    "zero3_teacher fp32",
]
PARTS = ("waits", "collectives", "findings")


def run_jobs(jobs: list[dict], folder: Path) -> list[dict]:
    """Run jobs in one process of their own (driver.py); returns a result for each."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.fake_cuda.driver", str(folder / "jobs.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and len(lines) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    errors = [result["error"] for result in results if "error" in result]
    assert not errors, "\n".join(errors) + done.stderr[-3000:]
    return results


@pytest.fixture(scope="module")
def fast_results(tmp_path_factory) -> dict[str, dict]:
    """Results of all fast jobs, from one process: to start it costs as much as two of them."""
    jobs = {case: job_of(case) for case in FAST}
    jobs["wait"] = {**job_of(FAST[1]), "steps": 1, "fault": "wait"}
    jobs |= {f"resharded zero{stage}": resharded(stage) for stage in range(4)}
    results = run_jobs(list(jobs.values()), tmp_path_factory.mktemp("fast"))
    return dict(zip(jobs, results, strict=True))


def resharded(stage: int) -> dict:
    overrides = [f"deepspeed=zero{stage}", "precision=fp32", "optim.global_batch=64"]
    return {"run": "resharded", "recipe": "digits_mae", "overrides": overrides}


@pytest.mark.parametrize("case", FAST)
def test_a_rank_waits_and_sends_exactly_what_the_table_says(case, fast_results):
    check(case, fast_results[case])


@pytest.mark.slow
def test_so_do_the_other_stages_precisions_and_recipes(tmp_path):
    for case, result in zip(SLOW, run_jobs([job_of(case) for case in SLOW], tmp_path), strict=True):
        check(case, result)


def check(case: str, result: dict) -> None:
    assert {part: result[part] for part in PARTS} == {part: EXPECTED[case][part] for part in PARTS}, case
    # On the device: all state of the optimiser, and a teacher's features.
    assert result.get("misplaced", {}) == {}, case
    assert result.get("places", ["cuda:0"]) == ["cuda:0"], case
    # Kernels may change a little with torch.
    assert result["kernels"] <= 1.05 * EXPECTED[case]["kernels"], case


def test_the_shipped_recipe_waits_once_and_sends_what_overlap_asks_for():
    """Of a step of 4,096 images on 8 ranks; the table is compared with a run above."""
    for case in SHIPPED:
        row = EXPECTED[case]
        all_reduces = [count for name, count in row["collectives"].items() if name.startswith("allreduce")]
        assert sum(row["waits"].values()) <= 2 and sum(all_reduces) <= 4 and row["kernels"] < 4000
        assert row["findings"] == {}


def test_a_wait_that_is_added_to_the_step_is_found(fast_results):
    assert any(wait.startswith("device by jobs.py") for wait in fast_results["wait"]["waits"])


@pytest.mark.parametrize("stage", range(4))
def test_a_resharded_optimizer_is_on_its_parameters_device(stage, fast_results):
    """A fused AdamW on a GPU refuses a `step` on the CPU, in its first step."""
    result = fast_results[f"resharded zero{stage}"]
    assert len(result["places"]) >= 3 and result["misplaced"] == {}


def write_table() -> None:
    """Run the cases that the command names, or all, and write what was seen."""
    cases = sys.argv[1:] or [*FAST, *SLOW]
    with tempfile.TemporaryDirectory() as folder:
        results = run_jobs([job_of(case) for case in cases], Path(folder))
    kept = (*PARTS, "kernels")
    for case, result in zip(cases, results, strict=True):
        EXPECTED[case] = {part: result[part] for part in kept}
    TABLE.write_text(json.dumps(EXPECTED, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write_table()
