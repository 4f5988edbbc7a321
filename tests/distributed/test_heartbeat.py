"""A rank that dies, hangs or is stopped is named by the others, which end within their bound."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

from dmae_ds.distributed import heartbeat
from dmae_ds.distributed.missing import GONE_S, Report, judge

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 120  # a bound on hangs


def reports(**of_rank_2) -> list[Report]:
    return [
        Report(0, "a", 7, "training"),
        Report(1, "a", 7, "training"),
        Report(2, "b", 7, "saving", **of_rank_2),
    ]


@pytest.mark.parametrize(
    "quiet", [{}, {"silent_s": 59}, {"idle_s": 3600}, {"waits_s": 59, "idle_s": 3600}], ids=str
)
def test_nobody_is_accused_while_nobody_waits_too_long(quiet):
    assert judge(reports(**quiet), timeout_s=60) is None


def test_the_silent_rank_is_named_with_its_host_and_last_step():
    assert (
        judge(reports(silent_s=61), timeout_s=60)
        == "rank 2 (b) has not been heard of for 61 s; its last report was step 7, saving"
    )


def test_once_a_collective_broke_a_short_silence_is_enough():
    met = [Report(0, "a", 7, "training", broken="closed"), Report(1, "a", 7, "training")]
    assert judge([*met, Report(2, "b", 6, "training", silent_s=1)], timeout_s=60) is None
    assert judge([*met, Report(2, "b", 6, "training", silent_s=GONE_S + 1)], timeout_s=60).startswith(
        "rank 2 (b) has not been heard of for 5 s"
    )


@pytest.mark.parametrize(
    "waiting", [{"waits_s": 61, "idle_s": 62}, {"broken": "timed out", "idle_s": 61}], ids=str
)
def test_the_rank_that_does_not_wait_is_the_one_that_is_waited_for(waiting):
    found = judge(
        [
            Report(0, "a", 7, "training", **waiting),
            Report(1, "b", 7, "waiting for data", idle_s=63),
            Report(2, "b", 7, "training", waits_s=60),
        ],
        timeout_s=60,
    )
    assert found.startswith("rank 1 (b) is stuck") and "step 7, waiting for data, 63 s ago" in found


def test_of_ranks_that_all_wait_the_one_furthest_behind_is_named():
    found = judge(
        [
            Report(0, "a", 8, "training", waits_s=61),
            Report(1, "b", 7, "saving", waits_s=61),
            Report(2, "b", 8, "training", waits_s=61),
        ],
        timeout_s=60,
    )
    assert found.startswith("rank 1 (b) is stuck")


def start(fates: list[str], *, timeout_s: float) -> list[subprocess.Popen]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(fates)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [
        subprocess.Popen(
            [sys.executable, REPOSITORY / "tests" / "heartbeat_driver.py", str(timeout_s), str(rank), fate],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, fate in enumerate(fates)
    ]


@pytest.mark.parametrize(
    "fates, line",
    [
        (["goes on", "dies"], r"rank 1 \(HOST\) is gone; its last report was step 2, training"),
        (
            ["is stopped", "goes on"],
            r"rank 0 \(HOST\) has not been heard of for \d+ s; its last report was step 2, training",
        ),
        pytest.param(
            ["goes on", "hangs"],
            r"rank 1 \(HOST\) is stuck: others have waited \d+ s for it; its last report was step 2, waiting for data, \d+ s ago",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["goes on", "is stopped"],
            r"rank 1 \(HOST\) has not been heard of for \d+ s; its last report was step 2, training",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["computes", "dies"],
            r"rank 1 \(HOST\) is gone; its last report was step 2, training",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["dies", "computes"],
            r"rank 0 \(HOST\) is gone( \(.+\))?; its last report was step 2, training",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["computes", "is stopped"],
            r"rank 1 \(HOST\) has not been heard of for \d+ s; its last report was step 2, training",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["hangs", "goes on"],
            r"rank 0 \(HOST\) is stuck: others have waited \d+ s",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["computes", "fails"],
            r"rank 1 \(HOST\) ended after step 2, training: no space left",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_the_others_end_with_a_line_that_names_it(fates, line):
    ranks = start(fates, timeout_s=5)
    lost = next(rank for rank, fate in enumerate(fates) if fate not in ("goes on", "computes"))
    try:
        said = ranks[1 - lost].communicate(timeout=LIMIT_S)[1]
        assert ranks[1 - lost].returncode == 1
        ranks[lost].kill()
        said += ranks[lost].communicate()[
            1
        ]  # a rank that hears its own name ends too, and may be the one that speaks for its node
        (found,) = [text for text in said.splitlines() if text.startswith("dmae-ds: error")]
        host = re.escape(socket.gethostname())
        assert re.search(line.replace("HOST", host), found) and found.endswith(
            "continue with --resume auto"
        ), said
        assert (
            "fails" in fates or "Traceback" not in said
        )  # no command stands around this driver, to make a line of its own error
    finally:
        for process in ranks:
            process.kill()


def test_ranks_that_end_together_miss_nobody():
    ranks = start(["goes on", "goes on", "goes on"], timeout_s=5)
    try:
        assert [
            (process.communicate(timeout=LIMIT_S)[1].count("dmae-ds"), process.returncode)
            for process in ranks
        ] == [(0, 0)] * 3
    finally:
        for process in ranks:
            process.kill()


def test_a_heart_that_has_stopped_is_out_of_the_store(monkeypatch):
    class Slow(dict):
        def set(self, key, value):
            time.sleep(0.5)  # beyond GONE_S
            self[key] = value.encode()

        def check(self, keys):
            return all(key in self for key in keys)

    monkeypatch.setattr(heartbeat, "GONE_S", 0.01)
    monkeypatch.setattr(distributed, "TCPStore", lambda *_, **__: Slow())
    monkeypatch.setattr(distributed, "PrefixStore", lambda _, store: store)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    watch = heartbeat.Heartbeat(rank=0, size=1, local_rank=0, local_size=1, life="0", timeout_s=60)
    watch.stop()
    assert not watch._threads[0].is_alive() and json.loads(watch._store["0"])["beats"] == -1


@pytest.mark.slow
def test_a_rank_that_never_comes_is_one_line():
    (first, second) = start(["goes on", "goes on"], timeout_s=8)
    second.send_signal(signal.SIGKILL)
    since = time.monotonic()
    said = first.communicate(timeout=LIMIT_S)[1]
    second.communicate()
    assert first.returncode == 1 and time.monotonic() - since < LIMIT_S
    assert "RunFailed: rank 0" in said and "did not meet all 2 ranks at 127.0.0.1:" in said, said
