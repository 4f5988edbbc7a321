"""Facts that healthy nodes would report, ways to change one of them, and the checks that follow.

GPUs appear here as made-up facts alone: none of these tests has seen one.
"""

from __future__ import annotations

import copy
from typing import Any

from dmae_ds.doctor.check import FAIL, OK, SKIP, Check, count_verdicts, render
from dmae_ds.doctor.checklist import Table, judge
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.judge_machines import Target

GIB = 2**30
FOUND = {
    "python": "3.11.7",
    "torch": "2.6.0",
    "deepspeed": "0.19.8",
    "timm": "1.0.31",
    "dmae-ds": "0.1.0",
    "numpy": "1.26.4",
}
GPU = {"name": "NVIDIA H100", "free": 79 * GIB, "total": 80 * GIB}


def target(num: int = 2, *, slots: int = 1, kind: str = "pdsh", recipe: str | None = "digits_dmae") -> Target:
    return Target([Node(f"node{index}", slots) for index in range(num)], kind, "10.0.0.1", 29500, recipe)


def healthy(num: int = 2, *, gpus: int = 0) -> dict[str, dict]:
    """The facts of node0, node1, ..."""
    return {f"node{index}": _node(index, gpus) for index in range(num)}


def _node(index: int, gpus: int) -> dict:
    part = {"fingerprint": "abc", "samples": 1400, "shards": 3}
    facts = {
        "hostname": f"node{index}",
        "machine": {"cores": 32, "memory": 64 * GIB, "shm": 32 * GIB, "open_files": 65536},
        "code": {
            "folder": "/code/dmae_ds",
            "files": {"dmae_ds/cli/main.py": "1", "dmae_ds/train/loop.py": "2"},
        },
        "network": {
            "interfaces": {"lo": ["127.0.0.1", "::1"], "eth0": [f"10.0.0.{index + 1}"]},
            "own_name": [f"10.0.0.{index + 1}"],
            "addresses": [f"10.0.0.{index + 1}"],
            "asked": {"GLOO_SOCKET_IFNAME": None, "NCCL_SOCKET_IFNAME": None},
        },
        "versions": {
            "found": dict(FOUND),
            "asked": ["torch >= 2.6", "deepspeed >= 0.19.8", "numpy >= 1.26"],
            "executable": "/venv/bin/python",
        },
        "devices": {
            "gpus": [dict(GPU) for _ in range(gpus)],
            "driver": "550.54" if gpus else None,
            "processes": [],
        },
        "recipe": {"digest": "d1"},
        "shards": {"data.train": dict(part), "data.val": dict(part)},
        "teacher": {"teacher": {"path": "/t.pth", "bytes": 10 * 2**20}},
        "trackers": {"names": ["tensorboard", "wandb"], "project": "masks", "logged_in": True},
        "start": {"micro_batch": 32, "accumulation": 1, "steps": 350, "resumes": None},
        "run_dir": {"path": "/shared/run", "made": [], "held": None, "free": 500 * GIB},
    }
    if index == 0:
        facts |= {
            "port": {"busy": None},
            "needs": {"save": 2 * GIB, "keep": 3, "gradients": 2**29, "batches": 2**28, "workers": 3},
        }
    return copy.deepcopy(facts)


def meetings(num: int = 2) -> dict[str, dict]:
    """The second answers of node0, node1, ...: all reach node0 and see all tokens."""
    tokens = {"seen": [str(index) for index in range(num)]}
    return {
        f"node{index}": {"reached": {"10.0.0.1": {"from": f"10.0.0.{index + 1}"}}, "tokens": dict(tokens)}
        for index in range(num)
    }


def put(facts: dict, path: str, value: Any) -> None:
    """Change a fact: put(facts, "node1:versions:found:torch", "2.5"); the value KeyError removes it."""
    *parents, last = path.split(":")
    for name in parents:
        facts = facts[int(name) if isinstance(facts, list) else name]
    if value is KeyError:
        del facts[last]
    else:
        facts[last] = value


def judge_all(
    facts: dict, met: dict, where: Target | None = None, clocks: dict | None = None
) -> dict[str, Check]:
    """All checks of these facts, by name. met: as `meetings` gives them."""
    table = Table(silent=True)
    judge(table, facts, met, clocks or {"node0": (0.0, 0.1), "node1": (0.2, 0.3)}, where or target())
    assert len({check.name for check in table.checks}) == len(table.checks)
    return {check.name: check for check in table.checks}


def assert_check(check: Check, verdict: str, detail: str, fix: str = "") -> None:
    """The check has this verdict, and its two texts carry these words, separated by |."""
    assert check.verdict == verdict, render(check)
    assert all(word.strip() in check.detail for word in detail.split("|")), render(check)
    assert all(word.strip() in check.fix for word in fix.split("|")), render(check)


def assert_one_wrong(changes: dict[str, Any], name: str, verdict: str, detail: str, fix: str) -> None:
    """Changing these facts (of a meeting: "met:...") makes this one check fail or warn, and no other.

    A check that can't be made because of it is skipped: a port that is taken cannot be listened at.
    """
    facts, met = healthy(), meetings()
    for path, value in changes.items():
        put(met if path.startswith("met:") else facts, path.removeprefix("met:"), value)
    checks = judge_all(facts, met)
    assert_check(checks[name], verdict, detail, fix)
    assert {other for other, check in checks.items() if check.verdict not in (OK, SKIP)} == {name}
    assert len(render(checks[name]).splitlines()) == 2
    assert count_verdicts(list(checks.values())).startswith("1 of " if verdict == FAIL else "all ")
