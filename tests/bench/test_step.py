"""`dmae-ds bench step` times training's own step by parts, and its figures add up."""

from __future__ import annotations

import json

import pytest
import torch

from dmae_ds.bench.step import Contestant, as_plain_mae, figures, table, with_one_micro_batch
from dmae_ds.cli.main import main
from dmae_ds.config.load import load_config
from dmae_ds.distributed.process_group import joined
from dmae_ds.distributed.world import World
from dmae_ds.plan.geometry import scaled
from dmae_ds.train import forecast
from dmae_ds.train.cut import CutRecipe
from tests.plan.conftest import geometry_of
from tests.train.conftest import command, run

RECIPE = [
    "digits_dmae",
    "optim.global_batch=8",
    "optim.micro_batch=4",
    "teacher.embed_dim=48",
    "teacher.num_heads=3",
    "teacher.depth=8",
]


@pytest.mark.slow
def test_parts_add_up_to_the_step_and_the_work_to_the_floor(tmp_path):
    done = run(
        command(
            [
                "bench",
                "step",
                *RECIPE,
                "--against",
                "mae",
                "--against",
                "objective.mask_ratio=0.9",
                "--rounds",
                "3",
                "--json",
            ],
            ranks=1,
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    dmae, sparse, mae = found["steps"]
    names = [step["name"] for step in found["steps"]]
    assert names == ["dmae", "objective.mask_ratio=0.9", "mae"]
    assert sparse["gflop"] < dmae["gflop"]
    assert "6 blocks" in found["recipe"] and "8 images a step on 1 ranks" in found["recipe"]
    assert found["rounds"] == 3 and set(found["gemm_kernel"]) == {"fp32"} and found["gemm_kernel"]["fp32"]
    assert set(dmae["parts"]) == {"prepare", "teacher", "forward", "backward", "optimizer"}
    assert set(mae["parts"]) == set(dmae["parts"]) - {"teacher"}
    for step in (dmae, sparse, mae):
        assert step["gflop"] == pytest.approx(sum(part.get("gflop", 0) for part in step["parts"].values()))
        assert step["of_peak"] == pytest.approx(
            step["gflop"] / found["gemm_gflops"]["fp32"] / step["seconds"]
        )
        assert step["images_per_s"] == pytest.approx(8 / step["seconds"]) and step["peak_gib"] > 0
        assert 0 < step["parts"]["backward"]["of_peak"] < 1
    # two matrix products a weight and token in backward, one in forward
    assert 1.8 < dmae["parts"]["backward"]["gflop"] / dmae["parts"]["forward"]["gflop"] < 2.1
    # the head to the teacher's width is work too
    assert dmae["parts"]["forward"]["gflop"] > mae["parts"]["forward"]["gflop"]


@pytest.mark.slow
def test_data_and_exchange_are_timed_on_two_ranks(digits, tmp_path):
    data = [f"data.train={digits / 'train'}", "data.num_workers=0"]
    done = run(
        command(
            ["bench", "step", *RECIPE, *data, "deepspeed=zero2", "--data", "--rounds", "2", "--json"], ranks=2
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (dmae,) = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["steps"]
    assert dmae["parts"]["data"]["seconds"] > 0 and dmae["exchange_seconds"] > 0
    assert next(iter(dmae["parts"])) == "data"


def test_other_placements_are_refused(tmp_path):
    done = run(command(["bench", "step", *RECIPE, "teacher.placement=zero3"], ranks=1), cwd=tmp_path)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "teacher.placement=replicated" in line and "zero3" in line


def test_figures_are_medians_of_rounds_and_shares_of_the_measured_rate():
    one = Contestant(
        "dmae",
        None,
        {"teacher": (20, torch.bfloat16), "forward": (10, torch.float32), "backward": (20, torch.float32)},
        images=4,
        first=9.0,
        peak=1 << 30,
        predicted=1 << 29,
    )
    one.rounds = [{"teacher": 1.0, "forward": 1.0, "backward": 2.0, "optimizer": 0.5} for _ in range(2)] + [
        dict.fromkeys(("teacher", "forward", "backward", "optimizer"), 9.0)
    ]
    result = figures(one, {torch.float32: 20.0, torch.bfloat16: 40.0})
    assert result["seconds"] == 4.5
    assert result["floor_seconds"] == 10 / 20 + 20 / 20 + 20 / 40
    assert result["of_peak"] == pytest.approx(2.0 / 4.5)
    parts = result["parts"]
    assert parts["teacher"]["of_peak"] == parts["forward"]["of_peak"] == 0.5
    assert "of_peak" not in parts["optimizer"]
    changes = {"name": "mae", "seconds": 3.0, "round_seconds": [3.0, 4.5, 4.0], "gflop": result["gflop"] / 2}
    printed = table(
        {
            "recipe": "r",
            "device": "d",
            "threads": 1,
            "rounds": 3,
            "gemm_gflops": {"fp32": 1.0},
            "gemm_kernel": {"fp32": "kernel 1 x 2 x 3"},
            "steps": [result, {**result, **changes}],
        }
    )
    line = printed.splitlines()[-1]
    assert line.startswith("dmae / mae: 1.500 ")
    assert "kernel 1 x 2 x 3" in printed.splitlines()[1]
    assert "1.000 to 9.000" in line and "2.000" in line  # of the rounds; of the work


@pytest.mark.parametrize(
    "against, words",
    [("mae", "objective mae"), ("sdae", "key=value"), ("objective.mask_ratoi=0.9", "objective.mask_ratio?")],
)
def test_an_impossible_comparison_is_one_line(against, words, capsys):
    assert main(["bench", "step", "digits_mae", "--against", against]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_on_a_gpu_all_steps_take_the_micro_batch_that_the_first_can_have_with_the_others(monkeypatch):
    monkeypatch.setattr(forecast, "measure", lambda _, micro_batch, **__: scaled(geometry_of(), micro_batch))
    dmae = load_config("digits_dmae", ["optim.global_batch=64"])
    given = load_config("digits_dmae", ["optim.global_batch=64", "optim.micro_batch=4"])
    recipes = {"dmae": dmae, "mae": as_plain_mae(dmae), "given": given}
    needed = forecast.least_bytes(CutRecipe.of(dmae, World()), scaled(geometry_of(), 64))

    def cut(free: float, device: str) -> list[int | None]:
        monkeypatch.setattr(forecast, "free_bytes", lambda *_: free)
        with joined(World(), timeout_s=60):
            found = with_one_micro_batch(recipes, World(), torch.device(device))
        assert list(found) == list(recipes)
        return [config.optim.micro_batch for config in found.values()]

    assert cut(3 * needed, "cuda") == [64, 64, 4]
    assert cut(3 * needed - 3, "cuda") == [32, 32, 4]
    assert cut(1, "cpu") == [None, None, 4]
