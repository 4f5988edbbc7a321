"""The training loop: an evaluation that fails ends the run after a save, and loses no step."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from dmae_ds.config.run import ScheduleConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.train.evaluations import check_memory, with_ways_on
from dmae_ds.train.loop import train
from dmae_ds.train.schedule import Schedule
from tests.messages import refused


@pytest.mark.parametrize("ranks, on_every_rank, saved", [(1, False, [2]), (2, True, [2]), (2, False, [])])
def test_a_step_is_saved_before_an_evaluation_s_error_ends_the_run(monkeypatch, ranks, on_every_rank, saved):
    monkeypatch.setattr(collectives, "world_size", lambda: ranks)
    monkeypatch.setattr("dmae_ds.train.loop.AsyncFlags.reduce", lambda self, flags: None)
    engine, metric_logger, checkpoints = MagicMock(device=torch.device("cpu")), MagicMock(), MagicMock()
    checkpoints.due_by_steps.return_value = metric_logger.is_late.return_value = False
    error = UserError("sample 7 is corrupt")
    error.on_every_rank = on_every_rank

    def evaluate(step: int) -> None:
        if step == 2:
            raise error

    with refused("k-NN", "step 2", "sample 7", "eval={}", "--resume auto", "eval knn run", error=RunFailed):
        train(
            engine,
            [(MagicMock(), MagicMock(), {})] * 3,
            schedule=Schedule(ScheduleConfig(), 3, 8192, accumulation=1, log_every=9),
            start_step=0,
            ema=MagicMock(features=lambda masked: {}),
            metric_logger=metric_logger,
            checkpoints=checkpoints,
            stop=False,
            after_step=with_ways_on(evaluate, "k-NN", later="dmae-ds eval knn run"),
        )
    assert [call.kwargs["step"] for call in checkpoints.save.call_args_list] == saved
    assert metric_logger.flush.call_count == len(saved)


def test_memory_that_is_too_little_for_a_search_is_refused_before_the_first_step():
    settings = SimpleNamespace(memory_gib=1e-9)
    with refused("eval.memory_gib", "1e-09") as error:
        check_memory(settings, SimpleNamespace(embed_dim=32), num_train=24, k=3, num_classes=2)
    assert error.value.on_every_rank
