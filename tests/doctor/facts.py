"""What healthy nodes would say, and how one of their facts is changed: the material of the tests of judging."""

from __future__ import annotations

import copy
from typing import Any

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


def asked(num: int = 2, *, slots: int = 1, kind: str = "pdsh", recipe: str | None = "digits_dmae") -> Target:
    return Target([Node(f"node{index}", slots) for index in range(num)], kind, "10.0.0.1", 29500, recipe)


def healthy(num: int = 2, *, gpus: int = 0) -> dict[str, dict]:
    """The facts of node0, node1, ..."""
    return {f"node{index}": _node(index, gpus) for index in range(num)}


def _node(index: int, gpus: int) -> dict:
    part = {"fingerprint": "abc", "samples": 1400, "shards": 3}
    facts = {
        "hostname": f"node{index}",
        "machine": {"cores": 8, "memory": 64 * GIB, "shm": 32 * GIB, "open_files": 65536},
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
        "teacher": {"path": "/t.pth", "bytes": 10 * 2**20},
        "start": {"micro_batch": 32, "accumulation": 1, "steps": 350, "resumes": None},
        "run_dir": {"path": "/shared/run", "made": [], "held": None, "free": 500 * GIB},
    }
    if index == 0:
        facts |= {
            "port": {"busy": None},
            "needs": {"save": 2 * GIB, "keep": 3, "gradients": 2**29, "batches": 2**28},
        }
    return copy.deepcopy(facts)


def meetings(num: int = 2) -> dict[str, dict]:
    tokens = {"seen": [str(index) for index in range(num)]}
    return {
        f"node{index}": {"reached": {"10.0.0.1": {"from": f"10.0.0.{index + 1}"}}, "tokens": dict(tokens)}
        for index in range(num)
    }


def put(facts: dict, path: str, value: Any) -> None:
    """put(facts, "node1:versions:found:torch", "2.5"); a value of KeyError takes the fact away."""
    *parents, last = path.split(":")
    for name in parents:
        facts = facts[name]
    if value is KeyError:
        del facts[last]
    else:
        facts[last] = value
