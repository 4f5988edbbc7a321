"""`teacher.placement=auto` end to end, and the line that compares memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dmae_ds.config.load import read_saved_config
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.plan.geometry import measure
from dmae_ds.plan.memory import Memory
from dmae_ds.train import forecast
from tests.train.conftest import command, environment, losses, run


def test_auto_is_settled_on_every_rank_said_once_and_written_down(tiny_recipe, tmp_path):
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
        assert f"{other} 0." in done.stderr  # what it was held against
    teacher = read_saved_config(folder).teacher
    assert (teacher.placement, teacher.stages) == ("replicated", None) and len(losses(folder)) > 3


class Alone:
    """What resolve_placement asks of dist, with one rank there."""

    gather_objects = staticmethod(lambda value: [value])
    together = staticmethod(lambda step: step())
    main_says = staticmethod(lambda value: value)


@pytest.fixture
def settled(tiny_recipe, tmp_path, monkeypatch):
    from dmae_ds.config.load import load_config
    from dmae_ds.train.preflight import prepare

    def settle(*, free: float, ranks: int = 4, more: tuple[str, ...] = ()):
        monkeypatch.setattr(forecast, "dist", Alone)
        monkeypatch.setattr(forecast, "free_bytes", lambda device, local_ranks: free)
        config = load_config(
            tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", "teacher.placement=auto", *more]
        )
        preflight = prepare(config, World(size=ranks, local_size=ranks), resume="never")
        settled, reason = forecast.resolve_placement(preflight, torch.device("cpu"))
        return (
            settled.config.teacher,
            reason,
            forecast.predict(settled, measure(settled.config, settled.micro_batch), gpu=False).total,
        )

    return settle


def test_auto_takes_a_pipeline_where_the_replicated_teacher_is_too_large(settled):
    # A teacher of 20 MB a block, whose weights are more than the stream's messages.
    large = ("teacher.embed_dim=1536", "teacher.depth=8", "teacher.num_heads=8")
    teacher, reason, needed = settled(free=2**34, more=large)
    assert (teacher.placement, teacher.stages) == ("replicated", None) and reason.startswith(
        "replicated (chosen by auto"
    )
    teacher, reason, less = settled(free=needed - 1, more=large)
    assert teacher.placement == "pipeline" and teacher.stages in (2, 4) and less < needed
    assert "replicated" in reason and "(too much)" in reason


def test_auto_on_one_rank_and_on_a_machine_that_is_too_small(settled):
    assert settled(free=2**30, ranks=1)[0].placement == "replicated"
    with pytest.raises(UserError, match="nothing fits into 0.0 GiB a rank; the least is"):
        settled(free=2**20)


def test_what_is_not_auto_is_left_alone(tiny_recipe, tmp_path):
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
    assert "2.00 GiB a rank predicted" in forecast.compare(
        predicted, 2**31, gpu=False
    ) and "+0.0%" in forecast.compare(predicted, 2**31, gpu=False)
    assert "1.00 GiB a rank predicted" in forecast.compare(
        predicted, 2**30, gpu=True
    ) and "libraries" not in forecast.compare(predicted, 2**30, gpu=True)


def test_the_watch_sees_what_is_allocated_after_its_start():
    # A process of its own: this one's heap may hold enough freed pages to give the tensor without growing.
    code = (
        "import torch; from dmae_ds.train.peak_memory import MemoryWatch; before = torch.ones(2**26); del before; watch = MemoryWatch(torch.device('cpu')); "
        "start = watch.peak(); kept = torch.ones(2**26); print(start, watch.peak())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    start, peak = map(int, done.stdout.split())
    assert start < 0.1 * 2**28 and peak - start > 0.9 * 2**28  # what was before the watch is forgotten
