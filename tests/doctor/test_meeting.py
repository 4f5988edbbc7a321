"""Nodes without ssh meet at a store: they exchange values, compare clocks, and a missing one is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from dmae_ds.doctor.meeting import Meeting, wait_until_open
from dmae_ds.errors import RunFailed
from tests.messages import refused
from tests.train.conftest import free_port


def test_nodes_exchange_values_and_clocks():
    port = free_port()

    def attend(index: int) -> tuple:
        meeting = Meeting("127.0.0.1", port, index=index, size=3, limit_s=60)
        values = meeting.gather("value", {"index": index})
        clock = meeting.compare_clocks()
        meeting.close()
        return values, clock

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(attend, range(3)))
    assert all(values == [{"index": 0}, {"index": 1}, {"index": 2}] for values, _ in results)
    assert results[0][1] == (0.0, 0.0)
    assert all(0 < error < 60 and abs(ahead) <= error for _, (ahead, error) in results[1:])  # it is one clock


def test_a_node_that_does_not_come_is_named():
    meeting = Meeting("127.0.0.1", free_port(), index=0, size=3, limit_s=0.3)
    with refused("node 1, 2", "0.3 s", "--node_rank", error=RunFailed):
        meeting.gather("value", None)


def test_a_node_0_that_does_not_answer_is_named_with_its_address():
    port = free_port()
    with refused(f"127.0.0.1:{port}", "node 0", "--master_addr", error=RunFailed):
        Meeting("127.0.0.1", port, index=1, size=2, limit_s=0.3)
    with pytest.raises(OSError):
        wait_until_open("127.0.0.1", port, 0.1)
