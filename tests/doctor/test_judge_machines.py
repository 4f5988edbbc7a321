"""Facts of what is installed and plugged in lead to the right check with its fix, and to no other."""

from __future__ import annotations

import itertools

import pytest

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, render
from dmae_ds.doctor.judge_machines import judge_clocks, judge_python, judge_ssh
from dmae_ds.doctor.reach import Trouble
from tests.doctor.facts import (
    GIB,
    assert_check,
    assert_one_wrong,
    healthy,
    judge_all,
    meetings,
    put,
    target,
)

OF_EVERY_RUN = {"versions", "code", "devices", "port", "limits"}
OF_A_RECIPE = {"recipe", "shards", "teacher", "trackers", "batch", "run folder", "disk"}
OF_SEVERAL_NODES = {"interface", "master", "clocks"}


@pytest.mark.parametrize("num, gpus", list(itertools.product((1, 2, 64), (0, 8))))
def test_healthy_nodes_pass_every_check(num, gpus):
    clocks = {f"node{index}": (0.0, 0.1) for index in range(num)}
    facts, where = healthy(num, gpus=gpus), target(num, slots=max(1, gpus))
    checks = judge_all(facts, meetings(num), where, clocks)
    assert {check.verdict for check in checks.values()} == {OK}
    of_these = (OF_SEVERAL_NODES if num > 1 else set()) | ({"cores"} if gpus else set())
    assert set(checks) == OF_EVERY_RUN | OF_A_RECIPE | of_these
    assert all(len(render(check)) < 250 and not check.fix for check in checks.values())


LOOP, NEW = "dmae_ds/train/loop.py", "dmae_ds/new.py"
CASES = [
    (
        {"node1:versions:found:torch": "2.7.0"},
        "versions",
        "torch|2.6.0 on node0|2.7.0 on node1",
        "torch==2.6.0|node1",
    ),
    (
        {"node1:versions:found:python": "3.12.1"},
        "versions",
        "3.11.7 on node0|3.12.1 on node1",
        "Python 3.11.7|node1",
    ),
    (
        {"node1:versions:found:numpy": "1.20"},
        "versions",
        "node1: numpy 1.20|>=1.26",
        "pip install 'numpy>=1.26'|node1",
    ),
    ({"node1:versions:found:numpy": None}, "versions", "node1: numpy", "pip install"),
    (
        {"node1:versions": {"error": "ImportError: libcu.so"}},
        "versions",
        "node1: ImportError: libcu.so",
        "import torch",
    ),
    ({f"node1:code:files:{LOOP}": "9"}, "code", f"node1|node0|{LOOP}", "node1 (/code/dmae_ds)"),
    ({f"node1:code:files:{NEW}": "9"}, "code", NEW, "node1"),
    ({"node1:machine:shm": 64 * 2**20}, "limits", "/dev/shm|64 MiB on node1", "--shm-size"),
    ({"node1:machine:open_files": 256}, "limits", "256 on node1|262", "ulimit -n"),
    ({"node1:machine": {"error": "OSError: /dev/shm"}}, "limits", "node1: OSError: /dev/shm", "node"),
]


@pytest.mark.parametrize("changes, name, detail, fix", CASES, ids=[case[2][:30] for case in CASES])
def test_one_wrong_fact_fails_one_check_with_its_fix(changes, name, detail, fix):
    assert_one_wrong(changes, name, FAIL, detail, fix)


@pytest.mark.parametrize(
    "changes, verdict, detail, fix",
    [
        ({"node1:devices:gpus": []}, FAIL, "node1|0 GPUs|2 slots", "nvidia-smi"),
        ({"node1:devices:driver": "470.1"}, WARN, "driver 470.1 on node1", "equal nodes"),
        (
            {"node1:devices:gpus:1:free": 10 * GIB, "node1:devices:processes": ["4711, python"]},
            WARN,
            "node1: 10 of 80 GiB free on GPU 1|4711, python",
            "nvidia-smi",
        ),
    ],
)
def test_gpus_are_counted_and_compared(changes, verdict, detail, fix):
    facts = healthy(gpus=2)
    for path, value in changes.items():
        put(facts, path, value)
    assert_check(judge_all(facts, meetings(), target(slots=2))["devices"], verdict, detail, fix)


@pytest.mark.parametrize("limit, verdict", [(262, OK), (261, FAIL), (-1, OK)])  # -1: without a limit
def test_as_many_open_files_as_are_needed_are_enough(limit, verdict):
    facts = healthy()
    put(facts, "node1:machine:open_files", limit)
    assert judge_all(facts, meetings())["limits"].verdict == verdict


@pytest.mark.parametrize("cores, verdict", [(8, OK), (7, WARN), (1, WARN)])
def test_ranks_and_loader_workers_have_a_core_each(cores, verdict):
    facts = healthy(gpus=2)
    put(facts, "node1:machine:cores", cores)
    check = judge_all(facts, meetings(), target(slots=2))["cores"]
    assert check.verdict == verdict
    if verdict == WARN:
        assert_check(check, WARN, f"node1|{cores} for 8", "--cpus-per-task=8|data.num_workers")
        assert "node0" not in check.detail


@pytest.mark.parametrize(
    "skew, error, verdict", [(0.0, 0.5, OK), (1.4, 0.5, OK), (-1.6, 0.5, WARN), (3600.0, 2.0, WARN)]
)
def test_a_clock_is_wrong_if_the_difference_exceeds_its_error(skew, error, verdict):
    check = judge_clocks({"node0": (0.0, 0.1), "node1": (skew, error)})
    if verdict == OK:
        assert_check(check, OK, "within")
    else:
        direction = "ahead" if skew > 0 else "behind"
        assert_check(check, WARN, f"node1 is {abs(skew):.0f} s {direction}", "chrony|node1")


def test_nodes_that_refuse_ssh_are_grouped_and_the_others_are_judged():
    refused = [Trouble("ssh", "key refused", f"ssh-copy-id node{index}") for index in (1, 2)]
    no_python = Trouble("python", "no /venv/bin/python", "install the environment")
    answers = {"node0": {}, "node1": refused[0], "node2": refused[1], "node3": no_python}
    ssh, pdsh = judge_ssh(answers, pdsh="pdsh-2.34 (+readline)\nrcmd modules: ssh,rsh,exec (default: rsh)")
    assert_check(ssh, FAIL, "node1, node2: key refused", "ssh-copy-id node1|node2")
    assert (pdsh.verdict, pdsh.detail) == (OK, "pdsh-2.34")
    python = judge_python(answers)
    assert (python.verdict, python.detail) == (FAIL, "node3: no /venv/bin/python")
    assert judge_python({"node1": answers["node1"]}).verdict == SKIP


@pytest.mark.parametrize(
    "version, detail",
    [(None, "not installed"), ("pdsh-2.34\nrcmd modules: rsh,exec (default: rsh)", "ssh module")],
)
def test_pdsh_is_required_with_its_ssh_module(version, detail):
    _, pdsh = judge_ssh({"node0": {}}, pdsh=version)
    assert_check(pdsh, FAIL, detail, "install")
