"""One line of the doctor's output, and how lists of nodes are written in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"
MAX_NAMES = 4


@dataclass(frozen=True)
class Check:
    """The name of a check, its verdict, what was found, and how to fix it if something is wrong."""

    name: str
    verdict: str
    detail: str
    fix: str = ""


def render(check: Check) -> str:
    """Text of a check: one line, and for a failure or a warning a second one with the fix."""
    line = f"{check.verdict:<5} {check.name:<11} {' '.join(check.detail.split())}"
    return f"{line}\n      {'':<11} -> {check.fix}" if check.fix else line


def count_verdicts(checks: list[Check]) -> str:
    """How many checks passed, failed, warned and were skipped."""
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in (OK, WARN, FAIL, SKIP)}
    num_done = len(checks) - count[SKIP]
    notes = []
    if count[WARN]:
        notes.append(f"{count[WARN]} with a warning")
    if count[SKIP]:
        notes.append(f"{count[SKIP]} skipped")
    summary = f"{count[FAIL]} of {num_done} checks failed" if count[FAIL] else f"all {num_done} checks passed"
    return f"{summary} ({', '.join(notes)})" if notes else summary


def join_names(nodes: Iterable[str]) -> str:
    """node1, node2, ... and how many more, if there are many."""
    nodes = list(nodes)
    if len(nodes) > MAX_NAMES + 1:
        nodes = [*nodes[:MAX_NAMES], f"{len(nodes) - MAX_NAMES} more"]
    return ", ".join(nodes)


def group_nodes(values: Mapping[str, object]) -> dict[object, list[str]]:
    """Group nodes by value, the commonest value first (among equally common ones, the first node's)."""
    groups: dict[object, list[str]] = {}
    for node, value in values.items():
        groups.setdefault(value, []).append(node)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def list_values(values: Mapping[str, object]) -> str:
    """Every value with its nodes: "2.6 on node1, node2; 2.5 on node3"."""
    return "; ".join(f"{value} on {join_names(nodes)}" for value, nodes in group_nodes(values).items())


def split_fix(error: str) -> tuple[str, str]:
    """Split an error message of this project at its last semicolon into the problem and the fix."""
    problem, _, fix = error.replace("\n", " | ").rpartition("; ")
    return (problem, fix) if problem else (error, "")
