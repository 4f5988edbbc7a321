"""Facts of all nodes -> the right line, the right fix, and no other line."""

from __future__ import annotations

import itertools

import pytest

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, render, verdict_line
from dmae_ds.doctor.checklist import Table, judge
from dmae_ds.doctor.judge_machines import judge_clocks, judge_python, judge_ssh
from dmae_ds.doctor.judge_network import matches
from dmae_ds.doctor.reach import Trouble
from tests.doctor.facts import GIB, asked, healthy, meetings, put

CLOCKS = {"node0": (0.0, 0.1), "node1": (0.2, 0.3)}


def judged(facts: dict, met: dict, question=None, clocks: dict = CLOCKS) -> dict[str, Check]:
    table = Table(silent=True)
    judge(table, facts, met, clocks, question or asked())
    assert len({check.name for check in table.checks}) == len(table.checks)
    return {check.name: check for check in table.checks}


@pytest.mark.parametrize("num, gpus", list(itertools.product((1, 2, 64), (0, 8))))
def test_healthy_nodes_are_all_ok(num, gpus):
    checks = judged(
        healthy(num, gpus=gpus),
        meetings(num),
        asked(num, slots=max(1, gpus)),
        {f"node{index}": (0.0, 0.1) for index in range(num)},
    )
    assert {check.verdict for check in checks.values()} == {OK}
    assert {
        "versions",
        "code",
        "devices",
        "port",
        "recipe",
        "shards",
        "teacher",
        "batch",
        "run folder",
        "disk",
        "limits",
    } <= set(checks)
    assert ("interface" in checks) == ("master" in checks) == ("clocks" in checks) == (num > 1)
    assert all(len(render(check)) < 250 and not check.fix for check in checks.values())


ONE = {"error": "data.train '/data': shard-000001.tar is missing; copy it again"}
# changed facts (of a meeting: "met:..."), the check, its verdict, what it says, the fix
CASES = [
    (
        {"node1:versions:found:torch": "2.7.0"},
        "versions",
        FAIL,
        "torch 2.6.0 on node0; 2.7.0 on node1",
        "install torch==2.6.0 on node1",
    ),
    (
        {"node1:versions:found:python": "3.12.1"},
        "versions",
        FAIL,
        "python 3.11.7 on node0; 3.12.1 on node1",
        "Python 3.11.7 on node1",
    ),
    (
        {"node1:versions:found:numpy": "1.20"},
        "versions",
        FAIL,
        "node1: numpy 1.20, >=1.26 is needed",
        "pip install 'numpy>=1.26' on node1",
    ),
    ({"node1:versions:found:numpy": None}, "versions", FAIL, "numpy is missing", "pip install"),
    (
        {"node1:versions": {"error": "ImportError: libcudart.so"}},
        "versions",
        FAIL,
        "node1: ImportError: libcudart.so",
        "import torch",
    ),
    (
        {"node1:code:files:dmae_ds/train/loop.py": "9"},
        "code",
        FAIL,
        "node1 has other code than node0: dmae_ds/train/loop.py",
        "same commit on node1 (/code/dmae_ds)",
    ),
    ({"node1:code:files:dmae_ds/new.py": "9"}, "code", FAIL, "dmae_ds/new.py", "node1"),
    (
        {"node0:port:busy": "process 7: vllm"},
        "port",
        FAIL,
        "29500 is taken on node0 (process 7: vllm)",
        "--master_port",
    ),
    (
        {"met:node1:reached:10.0.0.1:error": "Connection refused"},
        "master",
        FAIL,
        "10.0.0.1:29500 (node0): Connection refused on node1",
        "firewall",
    ),
    ({"met:node1": KeyError}, "master", FAIL, "no second answer from node1", "again"),
    (
        {"node1:network:asked:GLOO_SOCKET_IFNAME": "ens5"},
        "interface",
        FAIL,
        "GLOO_SOCKET_IFNAME=ens5, but there are lo, eth0 on node1",
        "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env",
    ),
    (
        {"node1:network:asked:GLOO_SOCKET_IFNAME": "lo"},
        "interface",
        FAIL,
        "loopback",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    (
        {"node0:network:own_name": ["127.0.1.1"], "node1:network:own_name": ["127.0.1.1"]},
        "interface",
        FAIL,
        "the host name resolves to 127.0.1.1, which gloo would tell the others, on node0, node1",
        "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env",
    ),
    ({"node1:network:own_name": []}, "interface", FAIL, "resolves to nothing", "GLOO_SOCKET_IFNAME=eth0"),
    (
        {
            "node1:network:interfaces": {
                "lo": ["127.0.0.1"],
                "eth0": ["10.0.0.2"],
                "docker0": ["172.17.0.1"],
            },
            "node1:network:asked:GLOO_SOCKET_IFNAME": "docker0",
        },
        "interface",
        WARN,
        "docker0, but node0 is reached over eth0",
        "GLOO_SOCKET_IFNAME=eth0",
    ),
    ({"node1:recipe:digest": "d2"}, "recipe", FAIL, "d1 on node0; d2 on node1", "copy it to node1"),
    (
        {"node1:shards": ONE, "node1:start": KeyError},
        "shards",
        FAIL,
        "node1: data.train '/data': shard-000001.tar is missing",
        "copy it again",
    ),
    (
        {"node0:shards": ONE, "node1:shards": ONE, "node0:start": KeyError, "node1:start": KeyError},
        "shards",
        FAIL,
        "every node: data.train",
        "copy it again",
    ),
    (
        {"node1:shards:data.val:fingerprint": "zzz"},
        "shards",
        FAIL,
        "data.val holds other data on other nodes: abc on node0; zzz on node1",
        "copy one of them",
    ),
    (
        {"node1:teacher:bytes": 5},
        "teacher",
        FAIL,
        "/t.pth: 10,485,760 bytes on node0; 5 bytes on node1",
        "copy it to node1",
    ),
    (
        {
            "node1:teacher": {"error": "teacher.weights '/t.pth' is not there; copy it"},
            "node1:start": KeyError,
        },
        "teacher",
        FAIL,
        "node1: teacher.weights",
        "copy it",
    ),
    (
        {"node0:start": {"error": "optim.global_batch 63 doesn't divide by 2 ranks; take 62"}},
        "batch",
        FAIL,
        "optim.global_batch 63",
        "take 62",
    ),
    (
        {"node1:run_dir:cannot_write": "Read-only file system"},
        "run folder",
        FAIL,
        "/shared/run cannot be written: Read-only file system on node1",
        "permissions",
    ),
    (
        {"met:node0:tokens:seen": ["0"], "met:node1:tokens:seen": ["1"]},
        "run folder",
        FAIL,
        "/shared/run is not the same folder on node0, node1",
        "share",
    ),
    (
        {"met:node1:tokens": {"error": "FileNotFoundError"}},
        "run folder",
        FAIL,
        "not the same folder",
        "share",
    ),
    (
        {"node1:run_dir:path": "/home/run"},
        "run folder",
        FAIL,
        "/shared/run on node0; /home/run on node1",
        "absolute path",
    ),
    (
        {"node0:run_dir:held": "process 7 on node3"},
        "run folder",
        FAIL,
        "/shared/run is in use by process 7 on node3",
        "wait for it",
    ),
    (
        {"node1:run_dir:free": 7 * GIB},
        "disk",
        FAIL,
        "7.0 GiB free in /shared/run on node1; 3 + 1 checkpoints of 2.0 GiB need 8.0 GiB",
        "checkpoint.keep",
    ),
    ({"node1:machine:shm": 64 * 2**20}, "limits", FAIL, "/dev/shm has 64 MiB on node1", "--shm-size"),
    ({"node1:machine:open_files": 256}, "limits", FAIL, "256 on node1; 262 are needed", "ulimit -n"),
]


@pytest.mark.parametrize(
    "changes, name, verdict, words, fix", CASES, ids=[f"{case[1]}: {case[3][:30]}" for case in CASES]
)
def test_one_wrong_fact_is_one_line_with_its_fix(changes, name, verdict, words, fix):
    facts, met = healthy(), meetings()
    for path, value in changes.items():
        put(met if path.startswith("met:") else facts, path.removeprefix("met:"), value)
    checks = judged(facts, met)
    found = checks[name]
    assert (found.verdict, words in found.detail, fix in found.fix) == (verdict, True, True), render(found)
    # A port that is taken cannot be listened at, a folder that differs is not looked at: those say so.
    assert {other for other, check in checks.items() if check.verdict not in (OK, SKIP)} == {name}
    assert len(render(found).splitlines()) == 2
    assert verdict_line(list(checks.values())).startswith("1 of " if verdict == FAIL else "all ")


def test_a_full_disk_is_said_once():
    facts = healthy()
    for node in facts.values():
        node["run_dir"] |= {"free": 0, "cannot_write": "disk full"}
    checks = judged(facts, meetings())
    assert [name for name, check in checks.items() if check.verdict == FAIL] == ["disk"]


def test_the_address_that_works_is_named():
    facts, met = healthy(), meetings()
    for node in met.values():
        node["reached"]["192.168.7.1"] = {"from": "192.168.7.2"}
    met["node1"]["reached"]["10.0.0.1"]["error"] = "no answer"
    assert "--master_addr 192.168.7.1" in judged(facts, met)["master"].fix


GPU_CASES = [
    ({"node1:devices:gpus": []}, FAIL, "node1 has 0 GPUs for 2 slots", "nvidia-smi"),
    ({"node1:devices:driver": "470.1"}, WARN, "driver 470.1 on node1", "equal nodes"),
]


@pytest.mark.parametrize("changes, verdict, words, fix", GPU_CASES)
def test_gpus_are_counted_and_compared(changes, verdict, words, fix):
    facts = healthy(gpus=2)
    for path, value in changes.items():
        put(facts, path, value)
    found = judged(facts, meetings(), asked(slots=2))["devices"]
    assert (found.verdict, words in found.detail, fix in found.fix) == (verdict, True, True), render(found)


def test_a_gpu_that_somebody_uses_is_a_warning_with_the_process():
    facts = healthy(gpus=2)
    facts["node1"]["devices"]["gpus"][1]["free"] = 10 * GIB
    facts["node1"]["devices"]["processes"] = ["4711, python"]
    found = judged(facts, meetings(), asked(slots=2))["devices"]
    assert (
        found.verdict == WARN and "node1: 10 of 80 GiB free on GPU 1 (process 4711, python)" in found.detail
    )


def test_on_gpus_nccl_s_interface_counts_and_not_gloo_s():
    facts = healthy(gpus=1)
    facts["node1"]["network"]["own_name"] = ["127.0.1.1"]
    assert judged(facts, meetings())["interface"].verdict == OK
    facts["node1"]["network"]["asked"]["NCCL_SOCKET_IFNAME"] = "ib0"
    assert judged(facts, meetings())["interface"].verdict == FAIL


@pytest.mark.parametrize(
    "value, nccl, fits",
    [
        ("eth0", False, True),
        ("eth", False, False),
        ("ib0,eth0", False, True),
        ("eth", True, True),
        ("=eth", True, False),
        ("=eth0", True, True),
        ("^docker,lo", True, True),
        ("^eth", True, False),
        ("^=eth", True, True),
    ],
)
def test_interface_names_match_as_the_libraries_match_them(value, nccl, fits):
    assert matches(value, "eth0", nccl=nccl) == fits


def test_without_ssh_the_variable_is_set_on_the_node():
    facts = healthy()
    facts["node1"]["network"]["own_name"] = ["127.0.1.1"]
    assert (
        "export GLOO_SOCKET_IFNAME=eth0 on node1"
        in judged(facts, meetings(), asked(kind="no_ssh"))["interface"].fix
    )


def test_without_a_recipe_only_the_machines_are_judged():
    facts = {
        node: {
            name: part
            for name, part in found.items()
            if name in ("hostname", "machine", "code", "network", "versions", "devices", "port")
        }
        for node, found in healthy().items()
    }
    checks = judged(facts, meetings(), asked(recipe=None))
    assert checks["recipe"].verdict == SKIP and "none was given" in checks["recipe"].detail
    assert not {"shards", "disk", "run folder"} & set(checks)


@pytest.mark.parametrize(
    "skew, unsure, verdict", [(0.0, 0.5, OK), (1.4, 0.5, OK), (-1.6, 0.5, WARN), (3600.0, 2.0, WARN)]
)
def test_a_clock_is_wrong_when_it_surely_is(skew, unsure, verdict):
    found = judge_clocks({"node0": (0.0, 0.1), "node1": (skew, unsure)})
    assert found.verdict == verdict
    assert verdict == OK or (
        f"node1 is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" in found.detail
        and "chrony" in found.fix
    )


def test_nodes_that_ssh_refuses_leave_the_others_judged():
    answers = {
        "node0": {},
        "node1": Trouble("ssh", "it does not accept your ssh key", "ssh-copy-id node1"),
        "node2": Trouble("ssh", "it does not accept your ssh key", "ssh-copy-id node2"),
        "node3": Trouble("python", "no /venv/bin/python", "install the environment"),
    }
    ssh, pdsh = judge_ssh(answers, pdsh="pdsh-2.34 (+readline)\nrcmd modules: ssh,rsh,exec (default: rsh)")
    assert (ssh.verdict, ssh.detail, ssh.fix) == (
        FAIL,
        "node1, node2: it does not accept your ssh key",
        "ssh-copy-id node1; the same for node2",
    )
    assert (pdsh.verdict, pdsh.detail) == (OK, "pdsh-2.34")
    python = judge_python(answers)
    assert (python.verdict, python.detail) == (FAIL, "node3: no /venv/bin/python")
    assert judge_python({"node1": answers["node1"]}).verdict == SKIP


@pytest.mark.parametrize(
    "said, words",
    [(None, "not installed"), ("pdsh-2.34\nrcmd modules: rsh,exec (default: rsh)", "no ssh module")],
)
def test_pdsh_must_be_there_with_its_ssh_module(said, words):
    _, found = judge_ssh({"node0": {}}, pdsh=said)
    assert found.verdict == FAIL and words in found.detail and "install" in found.fix
