"""The nodes of a run follow from the options, and later requests from the first ones."""

from __future__ import annotations

import socket

import pytest

from dmae_ds.doctor.checklist import (
    Question,
    count_gpus,
    find_needs,
    find_nodes,
    make_later_request,
    make_request,
)
from dmae_ds.doctor.hostfile import Node
from tests.messages import refused


def question(**changes) -> Question:
    options = {
        "recipe": "digits_mae",
        "overrides": ["run.seed=1"],
        "hostfile": None,
        "num_ranks": None,
        "port": 29500,
        "address": None,
        "node_rank": None,
        "num_nodes": None,
        "start": True,
        "allow_pipe": False,
        "limit_s": 60.0,
    }
    return Question(**{**options, **changes})


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\n")
    return path


def test_nodes_come_from_the_hostfile_or_are_this_machine(hostfile, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here = socket.gethostname()
    assert find_nodes(question(hostfile=hostfile)) == [Node("a", 2), Node("b", 2)]
    assert find_nodes(question()) == [Node(here, 1)]
    assert find_nodes(question(num_ranks=4)) == [Node(here, 4)]
    several = find_nodes(question(num_nodes=3, node_rank=1, num_ranks=2))
    assert [node.name for node in several] == ["node 0", here, "node 2"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_nodes": 3}, ["--num_nodes 3", "2"]),
        ({"num_ranks": 4}, ["--num_gpus 4", "--hostfile", "slots=4"]),
        ({"node_rank": 2}, ["--node_rank 2", "0 to 1"]),
        ({"node_rank": -1}, ["--node_rank -1", "0 to 1"]),
    ],
)
def test_options_that_contradict_the_hostfile_are_refused(hostfile, changes, words):
    with refused(*words):
        find_nodes(question(hostfile=hostfile, **changes))


@pytest.mark.parametrize("visible, count", [("", 0), ("-1", 0), ("0", 1), ("0,3", 2), ("GPU-a,GPU-b", 2)])
def test_visible_gpus_are_counted(visible, count):
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_later_request_has_the_folders_that_the_first_one_made():
    nodes = [Node("a", 2), Node("b", 2)]
    first = make_request(question(), nodes, 1, word="w", port=None)
    assert (first["round"], first["index"], first["slots"], first["world"]) == ("look", 1, 2, 4)
    facts = {"run_dir": {"path": "/run", "made": ["/run"]}}
    later = make_later_request("leave", first, facts)
    assert later == {**first, "round": "leave", "run_dir": "/run", "made": ["/run"]}
    assert make_later_request("leave", first, {})["run_dir"] is None


def test_needs_come_from_the_first_node_that_knows_them():
    facts = {"a": {}, "b": {"needs": {"error": "no"}}, "c": {"needs": {"batches": 1}}}
    assert find_needs(facts, "batches") == {"batches": 1} and find_needs(facts, "gradients") == {}
