"""The same losses with one process or two, ZeRO 0 to 3, accumulation, compiled blocks, and every launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from dmae_ds.config.load import read_saved_config
from tests.train.conftest import deepspeed, free_port, losses, metrics, run

DRIVER = Path(__file__).with_name("driver.py")
ALONE = {
    "alone": ["log.trackers=[tensorboard]"],
    "alone_accumulated": ["optim.micro_batch=4"],
    "alone_zero0": ["deepspeed=zero0"],
    "alone_deterministic": ["run.deterministic=true"],
    "alone_onednn": ["linear=onednn"],
    "alone_saved_by_time": ["checkpoint.every_minutes=1e-6", "checkpoint.keep=9"],
}
TWO_RANKS = {
    "zero0": ["deepspeed=zero0"],
    "zero1": ["deepspeed=zero1"],
    "zero2": ["deepspeed=zero2"],
    "zero3": ["deepspeed=zero3"],
    "zero3_offload": ["deepspeed=zero3_offload"],
    "zero2_accumulated": ["deepspeed=zero2", "optim.micro_batch=2"],
    "zero3_accumulated": ["deepspeed=zero3", "optim.micro_batch=2"],
    "zero1_checkpointed": ["deepspeed=zero1", "student.checkpoint_blocks=true"],
    "zero3_checkpointed": ["deepspeed=zero3", "student.checkpoint_blocks=true"],
    "zero2_clipped": ["deepspeed=zero2", "optim.clip_grad=0.5"],
    "zero2_onednn": ["deepspeed=zero2", "linear=onednn"],
    "zero2_bf16": ["deepspeed=zero2", "precision=bf16"],
    "zero3_bf16": ["precision=bf16", "deepspeed=zero3"],
    "zero1_fp16": ["precision=fp16", "deepspeed=zero1"],
    "zero2_fp16": ["deepspeed=zero2", "precision=fp16"],
    "zero0_autocast": ["precision=bf16_autocast", "deepspeed=zero0"],
}
ROUNDED = [name for name in TWO_RANKS if "bf16" in name or "fp16" in name or "autocast" in name]
SAME = [
    "alone_accumulated",
    "alone_zero0",
    "alone_deterministic",
    "alone_onednn",
    *[name for name in TWO_RANKS if name not in ROUNDED and "clip" not in name],
]


@pytest.fixture(scope="module")
def curves(tiny_recipe, tmp_path_factory) -> Path:
    """A folder with a run for every variant: one start of one process, one of two ranks."""
    folder = tmp_path_factory.mktemp("curves")
    for start, variants in (([sys.executable, DRIVER], ALONE), ([*deepspeed(2), DRIVER], TWO_RANKS)):
        recipes = [[*tiny_recipe, f"run.dir={folder / name}", *extra] for name, extra in variants.items()]
        done = run([*map(str, start), json.dumps(recipes)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (done.stdout + done.stderr).count("oneDNN") == 1  # in one variant of each start
    return folder


@pytest.fixture(scope="module")
def compiled(tiny_recipe, tmp_path_factory) -> Path:
    """The same under torch.compile, with one process and two ranks; each start takes a minute or two."""
    folder = tmp_path_factory.mktemp("compiled")
    for ranks, stages in ((1, (0, 1, 2)), (2, (0, 2))):
        start = [sys.executable, DRIVER] if ranks == 1 else [*deepspeed(2), DRIVER]
        compiled = [*tiny_recipe, "compile=true"]
        recipes = [
            [*compiled, f"run.dir={folder / f'{ranks}_zero{stage}'}", f"deepspeed=zero{stage}"]
            for stage in stages
        ]
        recipes += [
            [*compiled, f"run.dir={folder / f'{ranks}_checkpointed'}", "student.checkpoint_blocks=true"]
        ]
        done = run([*map(str, start), json.dumps(recipes)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        assert sum("compile" in line and "first step took" in line for line in lines) == len(recipes)
        # 4 blocks of the student, 3 of its teacher, 2 of the decoder.
        assert sum("9 blocks" in line for line in lines) == len(recipes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["1_zero0", "1_zero1", "1_zero2", "1_checkpointed", "2_zero0", "2_zero2", "2_checkpointed"]
)
def test_compiled_blocks_give_the_same_curve_and_weights(compiled, curves, name):
    assert losses(compiled / name) == pytest.approx(losses(curves / "alone"), rel=1e-4)
    expected = load_file(curves / "alone" / "student.safetensors")
    for key, tensor in load_file(compiled / name / "student.safetensors").items():
        if not key.endswith("qkv.bias"):
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-2, atol=1e-3 * expected[key].abs().max().item() + 1e-5
            )


def test_twenty_steps_reduce_the_loss(curves):
    curve = losses(curves / "alone")
    assert len(curve) == 20
    assert curve[-1] < 0.95 * curve[0]


@pytest.mark.parametrize("name", SAME)
def test_the_losses_are_those_of_one_process(curves, name):
    assert losses(curves / name) == pytest.approx(losses(curves / "alone"), rel=1e-5)


def test_saves_by_time_come_a_step_after_they_are_due_and_at_the_end(curves):
    saved = sorted(path.name for path in (curves / "alone_saved_by_time" / "checkpoints").glob("step-*"))
    # A save is always due, and follows one step later; the newest nine are kept.
    assert saved == [f"step-{step:08d}" for step in range(4, 21, 2)]
    (only,) = (curves / "alone" / "checkpoints").glob("step-*")
    assert only.name == "step-00000020"


def test_tensorboard_has_every_step(curves):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((curves / "alone" / "tensorboard").iterdir())))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        losses(curves / "alone"), rel=1e-6
    )
    assert not (curves / "zero2" / "tensorboard").exists()  # log.trackers=[]


def test_clipping_changes_the_curve(curves):
    assert losses(curves / "zero2_clipped") != pytest.approx(losses(curves / "alone"), rel=1e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_stays_near_fp32_and_is_not_fp32(curves, name):
    assert losses(curves / name) == pytest.approx(losses(curves / "alone"), rel=5e-2)
    assert losses(curves / name) != losses(curves / "alone")


@pytest.mark.parametrize("name", [*ALONE, *TWO_RANKS])
def test_the_student_loads_into_timm_strictly(curves, name):
    config = read_saved_config(curves / name)
    state = load_file(curves / name / "student.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    timm.create_model(config.student.name, num_classes=0, **config.student.overrides()).load_state_dict(
        state, strict=True
    )


@pytest.mark.parametrize("name", SAME)
def test_the_final_weights_are_those_of_one_process(curves, name):
    # The gradient of the key third of qkv.bias is rounding noise, which AdamW turns into steps of +-lr.
    expected = load_file(curves / "alone" / "student.safetensors")
    for key, tensor in load_file(curves / name / "student.safetensors").items():
        if not key.endswith("qkv.bias"):
            torch.testing.assert_close(
                tensor, expected[key], rtol=1e-3, atol=1e-4 * expected[key].abs().max().item() + 1e-6
            )


def test_the_share_of_the_gradient_is_logged_under_every_stage(curves):
    def shares(name):
        return [line["share/3"] for line in metrics(curves / name)]

    for name in ("zero0", "zero2", "zero3"):
        assert shares(name) == pytest.approx(shares("alone"), rel=0.05)
        assert 0.01 < min(shares(name)) <= max(shares(name)) < 0.99


@pytest.mark.parametrize("name", [*SAME, "zero3_bf16"])
def test_features_are_monitored_and_time_is_counted_under_every_stage(curves, name):
    rows, expected = metrics(curves / name), metrics(curves / "alone")
    assert [row["step"] for row in rows if "norm/3" in row] == [1, 5, 10, 15, 20]  # log.every_steps is 5
    near = 1e-3 if name in SAME else 0.05
    for norm in ("norm/3", "norm/4"):  # the mean over ranks of equal parts is the mean over all
        assert [row[norm] for row in rows if norm in row] == pytest.approx(
            [row[norm] for row in expected if norm in row], rel=near
        )
    # With 16 images a step, one rank has enough of them for an effective rank, each of two has not.
    assert all(("rank/mean" in row) == (name.startswith("alone") and "norm/3" in row) for row in rows)
    assert all(("spread/mean" in row) == ("rank/mean" in row) for row in rows)
    assert all(1 < row["rank/mean"] < 16 for row in rows if "rank/mean" in row)
    assert all(row[f"seconds/{part}"] >= 0 for row in rows for part in ("data", "teacher", "rest"))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_other_launchers_give_the_same_curve(curves, tiny_recipe, tmp_path, launcher):
    start = {
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m"],
        # With --cpu it starts one process only, see below. This is its way for GPUs, which works on CPUs too.
        "accelerate": [
            "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            str(free_port()),
            "-m",
        ],
    }[launcher]
    done = run([*start, "dmae_ds", "train", *tiny_recipe, f"run.dir={tmp_path / 'run'}"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks x 8" in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(curves / "alone"), rel=1e-5)


def test_a_launcher_that_starts_fewer_processes_than_asked_for_is_refused(tiny_recipe, tmp_path):
    start = [
        "accelerate",
        "launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
    ]
    done = run([*start, "dmae_ds", "train", *tiny_recipe, f"run.dir={tmp_path / 'run'}"], cwd=tmp_path)
    assert done.returncode != 0
    assert "deepspeed" in done.stderr and "torchrun" in done.stderr
    assert not (tmp_path / "run").exists()
