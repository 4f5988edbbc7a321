"""Facts of port, addresses and interfaces lead to the right check with its fix, and to no other."""

from __future__ import annotations

import pytest

from dmae_ds.doctor.check import FAIL, OK, WARN
from dmae_ds.doctor.judge_network import matches
from tests.doctor.facts import assert_check, assert_one_wrong, healthy, judge_all, meetings, target

GLOO, ECHO_GLOO = "GLOO_SOCKET_IFNAME", "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env"
LOOPBACK_NAME = {"node0:network:own_name": ["127.0.1.1"], "node1:network:own_name": ["127.0.1.1"]}
DOCKER = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.2"], "docker0": ["172.17.0.1"]}
CASES = [
    ({"node0:port:busy": "process 7: vllm"}, "port", FAIL, "29500|node0|process 7: vllm", "--master_port"),
    (
        {"met:node1:reached:10.0.0.1:error": "Connection refused"},
        "master",
        FAIL,
        "10.0.0.1:29500 (node0)|Connection refused on node1",
        "firewall",
    ),
    ({"met:node1": KeyError}, "master", FAIL, "node1", "again"),
    ({f"node1:network:asked:{GLOO}": "ens5"}, "interface", FAIL, f"{GLOO}=ens5|lo, eth0 on node1", ECHO_GLOO),
    ({f"node1:network:asked:{GLOO}": "lo"}, "interface", FAIL, "loopback", f"{GLOO}=eth0"),
    (LOOPBACK_NAME, "interface", FAIL, "127.0.1.1|node0, node1", ECHO_GLOO),
    ({"node1:network:own_name": []}, "interface", FAIL, "nothing|node1", f"{GLOO}=eth0"),
    (
        {"node1:network:interfaces": DOCKER, f"node1:network:asked:{GLOO}": "docker0"},
        "interface",
        WARN,
        "docker0|node0|eth0",
        f"{GLOO}=eth0",
    ),
]


@pytest.mark.parametrize(
    "changes, name, verdict, detail, fix", CASES, ids=[f"{case[1]}: {case[3][:30]}" for case in CASES]
)
def test_one_wrong_fact_fails_one_check_with_its_fix(changes, name, verdict, detail, fix):
    assert_one_wrong(changes, name, verdict, detail, fix)


def test_an_address_that_every_node_reaches_is_offered():
    met = meetings()
    for meeting in met.values():
        meeting["reached"]["192.168.7.1"] = {"from": "192.168.7.2"}
    met["node1"]["reached"]["10.0.0.1"]["error"] = "no answer"
    master = judge_all(healthy(), met)["master"]
    assert_check(master, FAIL, "10.0.0.1", "--master_addr 192.168.7.1")


def test_on_gpus_the_interface_of_nccl_counts_and_not_that_of_gloo():
    facts = healthy(gpus=1)
    facts["node1"]["network"]["own_name"] = ["127.0.1.1"]
    assert judge_all(facts, meetings())["interface"].verdict == OK
    facts["node1"]["network"]["asked"]["NCCL_SOCKET_IFNAME"] = "ib0"
    assert judge_all(facts, meetings())["interface"].verdict == FAIL


@pytest.mark.parametrize(
    "value, nccl, expected",
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
def test_interface_names_match_as_in_gloo_and_nccl(value, nccl, expected):
    assert matches(value, "eth0", nccl=nccl) == expected


def test_without_ssh_the_variable_is_set_on_the_node():
    facts = healthy()
    facts["node1"]["network"]["own_name"] = ["127.0.1.1"]
    interface = judge_all(facts, meetings(), target(kind="no_ssh"))["interface"]
    assert_check(interface, FAIL, "127.0.1.1", f"export {GLOO}=eth0|node1")
