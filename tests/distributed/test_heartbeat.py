"""A rank that dies, hangs or is stopped is named by the others, which end within their bound."""

from __future__ import annotations

import json
import os
import queue
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
from dmae_ds.distributed.missing import GONE_S, Report, judge, judge_alone

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("heartbeat_driver.py")
LIMIT_S = 120  # a bound on hangs


def reports(**rank_2) -> list[Report]:
    return [
        Report(0, "a", 7, "training"),
        Report(1, "a", 7, "training"),
        Report(2, "b", 7, "saving", **rank_2),
    ]


@pytest.mark.parametrize(
    "quiet", [{}, {"silent_s": 59}, {"idle_s": 3600}, {"waits_s": 59, "idle_s": 3600}], ids=str
)
def test_no_rank_is_accused_while_none_waits_too_long(quiet):
    assert judge(reports(**quiet), timeout_s=60) is None


def test_the_silent_rank_is_named_with_its_host_and_last_step():
    verdict = judge(reports(silent_s=61), timeout_s=60)
    for words in ("rank 2 (b)", "61 s", "step 7, saving"):
        assert words in verdict


def test_once_a_collective_broke_a_short_silence_is_enough():
    others = [Report(0, "a", 7, "training", broken="closed"), Report(1, "a", 7, "training")]
    assert judge([*others, Report(2, "b", 6, "training", silent_s=1)], timeout_s=60) is None
    verdict = judge([*others, Report(2, "b", 6, "training", silent_s=GONE_S + 1)], timeout_s=60)
    assert verdict.startswith("rank 2 (b) ") and "5 s" in verdict


@pytest.mark.parametrize(
    "waiting", [{"waits_s": 61, "idle_s": 62}, {"broken": "timed out", "idle_s": 61}], ids=str
)
def test_the_rank_that_does_not_wait_is_the_one_that_is_waited_for(waiting):
    verdict = judge(
        [
            Report(0, "a", 7, "training", **waiting),
            Report(1, "b", 7, "waiting for data", idle_s=63),
            Report(2, "b", 7, "training", waits_s=60),
        ],
        timeout_s=60,
    )
    assert verdict.startswith("rank 1 (b) is stuck") and "step 7, waiting for data, 63 s ago" in verdict


def test_of_ranks_that_all_wait_the_one_furthest_behind_is_named():
    verdict = judge(
        [
            Report(0, "a", 8, "training", waits_s=61),
            Report(1, "b", 7, "saving", waits_s=61),
            Report(2, "b", 8, "training", waits_s=61),
        ],
        timeout_s=60,
    )
    assert verdict.startswith("rank 1 (b) is stuck")


ABORTED = {"step": 7, "doing": "training", "idle_s": 720, "broken": "aborted"}


@pytest.mark.parametrize(
    ("others", "named", "words"),
    [
        (
            [Report(0, "a", 7, "evaluating", idle_s=719), Report(1, "a", 7, waits_s=9)],
            0,
            "evaluating, 719 s ago",
        ),
        ([Report(0, "a", 7, silent_s=GONE_S + 1), Report(1, "a", 7)], 0, "not reported"),
        # Silent, and has waited too long before: aborted too.
        ([Report(0, "a", 7, idle_s=700, silent_s=GONE_S + 1), Report(1, "a", 7, "saving")], 1, "saving"),
        ([Report(0, "a", 7, waits_s=9), Report(1, "a", 6, "training", waits_s=9)], 1, "step 6, training"),
        ([], 2, "SIGABRT"),
    ],
)
def test_an_aborted_rank_leads_to_the_one_it_waited_for(others, named, words):
    verdict = judge([*others, Report(2, "b", **ABORTED)], timeout_s=600)
    assert verdict.startswith(f"rank {named} (") and words in verdict
    assert ("SIGABRT" in verdict) == ("not reported" not in verdict)


@pytest.mark.parametrize(
    ("zero", "own", "has_watchdog", "named"),
    [
        ({"idle_s": 720}, {}, True, 1),
        ({"idle_s": 720}, {"waits_s": 700}, True, 0),
        ({"idle_s": 10}, {}, True, 0),
        ({"idle_s": 720}, {}, False, 0),
    ],
)
def test_a_rank_that_is_left_without_rank_0_asks_whether_itself_was_waited_for(
    zero, own, has_watchdog, named
):
    verdict = judge_alone(
        Report(0, **zero), Report(1, **own), error="closed", has_watchdog=has_watchdog, timeout_s=600
    )
    assert verdict.startswith(f"rank {named} (")


def start(fates: list[str], *, timeout_s: float) -> list[subprocess.Popen]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(fates)),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [
        subprocess.Popen(
            [sys.executable, DRIVER, str(timeout_s), str(rank), fate],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, fate in enumerate(fates)
    ]


GONE = r"is gone( \(.+\))?; its last report was step 2, training"
SILENT = r"has not reported for \d+ s; its last report was step 2, training"
STUCK = r"is stuck: others have waited \d+ s"


@pytest.mark.parametrize(
    ("fates", "lost", "verdict"),
    [
        (["continues", "dies"], 1, GONE),
        (["is stopped", "continues"], 0, SILENT),
        pytest.param(["continues", "hangs"], 1, STUCK + r".*waiting for data", marks=pytest.mark.slow),
        pytest.param(["continues", "is stopped"], 1, SILENT, marks=pytest.mark.slow),
        pytest.param(["computes", "dies"], 1, GONE, marks=pytest.mark.slow),
        pytest.param(["dies", "computes"], 0, GONE, marks=pytest.mark.slow),
        pytest.param(["computes", "is stopped"], 1, SILENT, marks=pytest.mark.slow),
        pytest.param(["hangs", "continues"], 0, STUCK, marks=pytest.mark.slow),
        pytest.param(["evaluates", "reads a GPU"], 0, STUCK + ".*evaluating", marks=pytest.mark.slow),
        pytest.param(["reads a GPU", "evaluates"], 1, STUCK + ".*evaluating", marks=pytest.mark.slow),
        pytest.param(
            ["computes", "fails"], 1, "ended after step 2, training: no space left", marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_the_other_rank_ends_with_a_line_that_names_the_lost_one(fates, lost, verdict):
    ranks = start(fates, timeout_s=5)
    other = ranks[1 - lost]
    try:
        output = other.communicate(timeout=LIMIT_S)[1]
        assert other.returncode == 1
        ranks[lost].kill()
        # A rank that reads its own name ends too, and may be the one that prints the line for its node.
        output += ranks[lost].communicate()[1]
        (line,) = [text for text in output.splitlines() if text.startswith("dmae-ds: error")]
        name = rf"rank {lost} \({re.escape(socket.gethostname())}\)"
        assert re.search(f"{name} {verdict}", line), output
        assert line.endswith("continue with --resume auto")
        # This driver has no command around it that would turn its own error into a line.
        assert "fails" in fates or "Traceback" not in output
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fates", "stuck"), [(["evaluates", "is aborted"], 0), (["is aborted", "evaluates"], 1)]
)
def test_an_aborted_rank_is_not_accused(fates, stuck):
    ranks = start(fates, timeout_s=5)
    try:
        output = ranks[stuck].communicate(timeout=LIMIT_S)[1]
        (line,) = [text for text in output.splitlines() if text.startswith("dmae-ds: error")]
        name = rf"rank {stuck} \({re.escape(socket.gethostname())}\)"
        assert re.search(f"{name} is stuck: rank {1 - stuck} .*step 3, evaluating", line), output
        assert ranks[1 - stuck].wait() == -signal.SIGABRT
    finally:
        for process in ranks:
            process.kill()


def test_ranks_that_end_together_accuse_no_rank():
    ranks = start(["continues", "continues", "continues"], timeout_s=5)
    try:
        outputs = [process.communicate(timeout=LIMIT_S)[1] for process in ranks]
        assert not [output for output in outputs if "dmae-ds" in output]
        assert [process.returncode for process in ranks] == [0, 0, 0]
    finally:
        for process in ranks:
            process.kill()


class Store(dict):
    """The launcher's store, in this process; `set` takes a while."""

    def __init__(self, takes_s: float = 0.0):
        self.takes_s = takes_s

    def set(self, key, value):
        time.sleep(self.takes_s)
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def compare_set(self, key, _, value):
        return self.setdefault(key, value.encode())

    def add(self, key, number):
        return 0


def watch_over(store: Store, monkeypatch, **kwargs) -> heartbeat.Heartbeat:
    monkeypatch.setattr(heartbeat, "GONE_S", 0.01)
    monkeypatch.setattr(distributed, "TCPStore", lambda *_, **__: store)
    monkeypatch.setattr(distributed, "PrefixStore", lambda _, store: store)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    return heartbeat.Heartbeat(rank=0, local_rank=0, life="0", timeout_s=60, **kwargs)


@pytest.mark.parametrize(
    ("killed_by", "idle_s", "verdict"),
    [
        (signal.SIGABRT, 720, "rank 0 .*is stuck: rank 1 .*SIGABRT"),
        (signal.SIGABRT, 3, "rank 1 .*is gone"),
        (signal.SIGKILL, 720, "rank 1 .*is gone"),
    ],
)
def test_how_a_rank_ended_tells_whether_it_is_the_cause(monkeypatch, killed_by, idle_s, verdict):
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    verdicts = queue.Queue()
    monkeypatch.setattr(
        heartbeat.Heartbeat, "_exit", lambda self, text, **_: verdicts.put(text) or self.stop()
    )
    monkeypatch.setattr(heartbeat.Heartbeat, "stop", lambda self: setattr(self, "_done", True))
    store = Store()
    neighbour = subprocess.Popen(["sleep", "600"])  # its end is seen only after `wait`
    try:
        watch = watch_over(store, monkeypatch, size=2, local_size=2)
        fields = {"beats": 1, "host": "a", "place": watch._place, "pid": neighbour.pid}
        fields |= {"step": 7, "doing": "training", "idle_s": idle_s, "waits_s": 0, "broken": ""}
        store.set("1", json.dumps(fields))
        time.sleep(0.2)
        neighbour.send_signal(killed_by)
        assert re.match(verdict, verdicts.get(timeout=LIMIT_S))
    finally:
        neighbour.kill()
        neighbour.wait()


def test_a_stopped_heartbeat_has_left_the_store(monkeypatch):
    watch = watch_over(Store(takes_s=1.5), monkeypatch, size=1, local_size=1)  # beyond GONE_S and BEAT_S
    watch.stop()
    assert not watch._threads[0].is_alive() and json.loads(watch._store["0"])["beats"] == -1


@pytest.mark.slow
def test_a_rank_that_never_comes_is_one_line():
    (first, second) = start(["continues", "continues"], timeout_s=8)
    second.send_signal(signal.SIGKILL)
    since = time.monotonic()
    output = first.communicate(timeout=LIMIT_S)[1]
    second.communicate()
    assert first.returncode == 1 and time.monotonic() - since < LIMIT_S
    assert "RunFailed: rank 0" in output and "2 ranks at 127.0.0.1:" in output, output
