"""`teacher.placement=auto` end to end, and the line that compares memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dmae_ds.config.load import read_saved_config
from dmae_ds.distributed.world import World
from dmae_ds.plan.geometry import measure, scaled
from dmae_ds.plan.memory import Memory
from dmae_ds.train import forecast
from tests.messages import refused
from tests.plan.conftest import geometry_of
from tests.train.conftest import command, environment, losses, run


def test_auto_is_decided_for_every_rank_printed_once_and_stored(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    done = run(
        command(
            [
                "train",
                *tiny_recipe,
                f"run.dir={folder}",
                "teacher.placement=auto",
                "optim.epochs=0.06",
                "optim.warmup_epochs=0.01",
            ],
            ranks=2,
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("chosen by auto") == 1
    for other in ("pipeline P=2", "zero3"):
        assert f"{other} 0." in done.stderr  # the other placements
    teacher = read_saved_config(folder).teacher
    assert (teacher.placement, teacher.stages) == ("replicated", None) and len(losses(folder)) > 3


class OneRank:
    """The collectives that resolve_placement calls, with a single rank."""

    gather_objects = staticmethod(lambda value: [value])
    raise_on_all_ranks = staticmethod(lambda step: step())
    broadcast_from_main = staticmethod(lambda value: value)


@pytest.fixture
def decide(tiny_recipe, tmp_path, monkeypatch):
    from dmae_ds.config.load import load_config
    from dmae_ds.train.preflight import prepare

    def decide(*, free: float, ranks: int = 4, more: tuple[str, ...] = ()):
        monkeypatch.setattr(forecast, "collectives", OneRank)
        monkeypatch.setattr(forecast, "free_bytes", lambda device, local_ranks: free)
        config = load_config(
            tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", "teacher.placement=auto", *more]
        )
        preflight = prepare(config, World(size=ranks, local_size=ranks), resume="never")
        placed, reason = forecast.resolve_placement(preflight, torch.device("cpu"))
        predicted = forecast.predict(placed, measure(placed.config, placed.micro_batch), gpu=False)
        return placed.config.teacher, reason, predicted.total

    return decide


def test_auto_takes_a_pipeline_where_the_replicated_teacher_is_too_large(decide, tmp_path):
    # A teacher of 20 MB a block, whose weights are more than the stream's messages; its file is not read.
    torch.save({}, tmp_path / "large.pth")
    numbers = ("teacher.embed_dim=1536", "teacher.depth=8", "teacher.num_heads=8")
    large = (*numbers, f"teacher.weights={tmp_path / 'large.pth'}")
    teacher, reason, needed = decide(free=2**34, more=large)
    assert (teacher.placement, teacher.stages) == ("replicated", None)
    assert reason.startswith("replicated (chosen by auto")
    teacher, reason, less = decide(free=needed - 1, more=large)
    assert teacher.placement == "pipeline" and teacher.stages in (2, 4) and less < needed
    assert "replicated" in reason and "(too much)" in reason


def test_auto_on_one_rank_and_on_a_machine_that_is_too_small(decide):
    assert decide(free=2**30, ranks=1)[0].placement == "replicated"
    with refused("0.0 GiB", "GiB"):
        decide(free=2**20)


@pytest.fixture
def cut(tiny_recipe, tmp_path, monkeypatch):
    """Prepare a recipe and choose its micro-batch, on a GPU with so many free bytes."""
    from dmae_ds.config.load import load_config
    from dmae_ds.train.preflight import prepare

    monkeypatch.setattr(forecast, "collectives", OneRank)
    monkeypatch.setattr(forecast, "measure", lambda _, micro_batch, **__: scaled(geometry_of(), micro_batch))

    def cut(*more: str, free: float, device: str = "cuda", resume: str = "never"):
        monkeypatch.setattr(forecast, "free_bytes", lambda device, local_ranks: free)
        words = [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", "optim.global_batch=64", *more]
        preflight = prepare(load_config(tiny_recipe[0], words), World(), resume=resume)
        return forecast.resolve_micro_batch(preflight, torch.device(device))[0]

    return cut


@pytest.mark.parametrize("placement", ["replicated", "auto"])
def test_a_gpu_takes_the_largest_micro_batch_that_fits_and_the_run_records_it(cut, placement):
    words = (f"teacher.placement={placement}",)
    whole = cut(*words, free=2**40)
    needed = forecast.least_bytes(whole, scaled(geometry_of(), 64))
    for free, expected in ((needed, (64, 1)), (needed - 1, (32, 2))):
        preflight = cut(*words, free=free)
        assert preflight.split == expected
        assert preflight.config.optim.micro_batch == preflight.identity["micro_batch"] == expected[0]
        assert preflight.deepspeed["train_micro_batch_size_per_gpu"] == expected[0]
        assert preflight.deepspeed["gradient_accumulation_steps"] == expected[1]
    with refused("0.0 GiB", "optim.micro_batch=1", "student.checkpoint_blocks"):
        cut(*words, free=1)


def test_a_micro_batch_that_is_given_or_began_stays_and_so_does_a_cpus(cut):
    assert cut(free=1, device="cpu").config.optim.micro_batch is None
    assert cut("optim.micro_batch=16", free=1).split == (16, 4)
    began = cut("optim.micro_batch=8", free=1)
    began.folder.begin(3)
    began.folder.commit(3, {"step": 3, "position": 192, **began.identity}, {})
    again = cut(free=2**40, resume="auto")
    assert again.resume_from is not None
    assert again.split == (8, 8) and again.config.optim.micro_batch == 8
    whole = cut("objective={name: mocov3}", "teacher=null", free=1)
    assert whole.split == (64, 1) and whole.config.optim.micro_batch is None


def test_other_placements_than_auto_stay(tiny_recipe, tmp_path):
    from dmae_ds.config.load import load_config
    from dmae_ds.train.preflight import prepare

    preflight = prepare(
        load_config(tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}"]),
        World(),
        resume="never",
    )
    assert forecast.resolve_placement(preflight, torch.device("cpu")) == (preflight, "")


def test_the_comparison_leaves_libraries_out_on_a_gpu():
    predicted = Memory(parameters=2**30, libraries=2**30)
    on_cpu = forecast.compare(predicted, 2**31, gpu=False)
    assert "2.00 GiB a rank predicted" in on_cpu and "+0.0%" in on_cpu
    on_gpu = forecast.compare(predicted, 2**30, gpu=True)
    assert "1.00 GiB a rank predicted" in on_gpu and "libraries" not in on_gpu


def test_peak_memory_counts_what_is_allocated_after_its_start():
    # A process of its own: this one's heap may hold enough freed pages for the tensor.
    code = """
import torch
from dmae_ds.train.peak_memory import PeakMemory
before = torch.ones(2**26)
del before
memory = PeakMemory(torch.device("cpu"))
start = memory.peak()
kept = torch.ones(2**26)
print(start, memory.peak())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    start, peak = map(int, done.stdout.split())
    assert start < 0.1 * 2**28 and peak - start > 0.9 * 2**28  # the earlier tensor does not count
