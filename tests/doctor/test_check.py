"""Lines of the doctor's output: nodes are grouped by value, long lists are cut, and verdicts are counted."""

from __future__ import annotations

import pytest

from dmae_ds.doctor.check import (
    FAIL,
    OK,
    SKIP,
    WARN,
    Check,
    count_verdicts,
    group_nodes,
    join_names,
    list_values,
    render,
    split_fix,
)


def test_a_failure_has_a_second_line_with_its_fix():
    assert render(Check("port", OK, "29500 is\n free")) == "ok    port        29500 is free"
    first, second = render(Check("port", FAIL, "taken", "choose another")).splitlines()
    assert first == "FAIL  port        taken" and second.split() == ["->", "choose", "another"]


@pytest.mark.parametrize(
    "verdicts, words",
    [
        ([OK, OK], ["all 2"]),
        ([OK, FAIL, SKIP], ["1 of 2", "1 skipped"]),
        ([OK, WARN, SKIP], ["all 2", "1 with a warning", "1 skipped"]),
    ],
)
def test_verdicts_are_counted_without_the_skipped_ones(verdicts, words):
    line = count_verdicts([Check("name", verdict, "") for verdict in verdicts])
    assert all(word in line for word in words)


def test_long_lists_of_nodes_are_cut():
    nodes = [f"node{index}" for index in range(7)]
    assert join_names(nodes[:5]) == "node0, node1, node2, node3, node4"
    assert join_names(nodes) == "node0, node1, node2, node3, 3 more"


def test_the_commonest_value_comes_first_and_the_first_nodes_value_among_equals():
    assert list(group_nodes({"a": 1, "b": 2, "c": 2})) == [2, 1]
    assert list(group_nodes({"a": 1, "b": 2})) == [1, 2]
    assert list_values({"a": 1, "b": 2, "c": 2}) == "2 on b, c; 1 on a"


def test_an_error_is_split_at_its_last_semicolon():
    assert split_fix("data.train: a; b is missing; copy it") == ("data.train: a; b is missing", "copy it")
    assert split_fix("no fix") == ("no fix", "")
