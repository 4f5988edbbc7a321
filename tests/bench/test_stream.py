"""`dmae-ds bench stream` measures every contestant on equal work under the launcher, and its ratios agree."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import distributed

from dmae_ds.bench.stream import Contestant, measure, table
from dmae_ds.distributed import collectives
from tests.train.conftest import command, run

RECIPE = [
    "digits_dmae",
    "optim.global_batch=8",
    "teacher.embed_dim=48",
    "teacher.num_heads=3",
    "teacher.depth=8",
]  # tapped at block 6


def rows_of(printed: str) -> dict[tuple[str, int], list[str]]:
    """{(teacher, P): the other columns}."""
    rows = {}
    for line in printed.splitlines():
        match = re.match(
            r"(replicated|stream without overlap|stream|eval_batch looking ahead|eval_batch) +(\d+) +(.*)",
            line,
        )
        if match:
            rows[match[1], int(match[2])] = match[3].split()
    return rows


def test_every_contestant_has_a_row_and_a_stage_holds_its_blocks(tmp_path):
    done = run(
        command(["bench", "stream", *RECIPE, "--sleep-ms", "2", "--rounds", "1", "--clocks", "3"], ranks=2),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "\r" not in done.stderr, done.stderr[-3000:]
    rows = rows_of(done.stdout)
    streams = ("stream", "stream without overlap", "eval_batch", "eval_batch looking ahead")
    assert set(rows) == {("replicated", 1), *((name, 2) for name in streams)}
    assert "6 of 8 blocks, taps block/6" in done.stdout and "blocks sleep 2 ms" in done.stdout
    assert float(rows["replicated", 1][3]) == 1 and float(rows["eval_batch", 2][4]) == 1
    weights = {name: float(columns[0]) for (name, _), columns in rows.items()}
    assert weights["stream"] < 0.55 * weights["replicated"]
    ahead = [columns[1] for columns in rows.values()]
    assert ahead == ["0", "4", "2", "1", "4"]
    replicated, stream = (float(rows[key][2]) for key in (("replicated", 1), ("stream", 2)))
    assert float(rows["stream", 2][3]) == pytest.approx(stream / replicated, rel=0.02)


def test_ratios_compare_contestants_of_the_same_run():
    @dataclass
    class One:
        name: str
        num_stages: int
        teacher: None = None
        ahead: int = 0
        bubble: float = 0.0
        num_bytes: int = 1 << 20

    printed = table(
        [One("replicated", 1), One("stream, P 2", 2), One("eval_batch, P 2", 2)],
        {"replicated": 1.0, "stream, P 2": 1.25, "eval_batch, P 2": 2.0},
        {},
        images=10,
    )
    rows = rows_of(printed)
    assert rows["stream", 2][2:5] == ["8.0", "0.800", "1.60"]
    assert rows["eval_batch", 2][2:5] == ["5.0", "0.500", "1.00"]


def test_shares_of_all_ranks_are_averaged_in_a_group_that_takes_no_cpu_tensors(monkeypatch):
    """As NCCL's group is, which this one stands in for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Teacher:
        waited_s = 0.0

    def advance(count: int) -> None:
        Teacher.waited_s += 1.0

    monkeypatch.setattr(collectives, "barrier", lambda: None)
    monkeypatch.setattr(collectives, "gather_objects", lambda shares: [shares, dict.fromkeys(shares, 0.0)])
    distributed.init_process_group("cuda:fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(RuntimeError):
            collectives.mean_over_ranks(torch.ones(1))
        one = Contestant("stream", 2, Teacher, advance, 0, 0.0)
        seconds, waited = measure([one], ticks=1, rounds=1, device=torch.device("cpu"))
    finally:
        distributed.destroy_process_group()
    assert waited["stream"] == pytest.approx(1.0 / seconds["stream"] / 2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["bench", "stream", *RECIPE], "found 1; start it with `deepspeed --num_gpus 4"),
        (["bench", "stream", "digits_mae"], "dmae_vit_large_to_base"),
        (["bench", "stream", *RECIPE, "--clocks", "0"], "--clocks"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, words):
    done = run(command(arguments, ranks=1), cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
