"""One line of the doctor's answer, and how all of them look on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

OK, WARN, FAIL, SKIP = "ok", "warn", "FAIL", "skip"
MOST_NAMES = 4


@dataclass(frozen=True)
class Check:
    """What was looked at, the verdict, what was found, and where something is wrong what mends it."""

    name: str
    verdict: str
    found: str
    mend: str = ""


def render(check: Check) -> str:
    """One line; under a failure or a warning a second one with the mend."""
    line = f"{check.verdict:<5} {check.name:<11} {' '.join(check.found.split())}"
    return f"{line}\n      {'':<11} -> {check.mend}" if check.mend else line


def verdict_line(checks: list[Check]) -> str:
    """How many passed, failed and were skipped."""
    count = {verdict: sum(check.verdict == verdict for check in checks) for verdict in (OK, WARN, FAIL, SKIP)}
    done = len(checks) - count[SKIP]
    notes = [
        f"{count[WARN]} with a warning" if count[WARN] else "",
        f"{count[SKIP]} skipped" if count[SKIP] else "",
    ]
    note = f" ({', '.join(filter(None, notes))})" if any(notes) else ""
    return (
        f"{count[FAIL]} of {done} checks failed{note}" if count[FAIL] else f"all {done} checks passed{note}"
    )


def names(nodes: Iterable[str]) -> str:
    """node1, node2, ... in a readable number."""
    nodes = list(nodes)
    shown = (
        nodes if len(nodes) <= MOST_NAMES + 1 else [*nodes[:MOST_NAMES], f"{len(nodes) - MOST_NAMES} more"]
    )
    return ", ".join(shown)


def groups(values: Mapping[str, object]) -> dict[object, list[str]]:
    """value -> the nodes that have it, the value of most nodes first (of equals: the first node's)."""
    found: dict[object, list[str]] = {}
    for node, value in values.items():
        found.setdefault(value, []).append(node)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def by_value(values: Mapping[str, object]) -> str:
    """ "2.6 on node1, node2; 2.5 on node3"."""
    return "; ".join(f"{value} on {names(nodes)}" for value, nodes in groups(values).items())


def split_mend(error: str) -> tuple[str, str]:
    """Our error lines say what was found and, behind the last semicolon, what to do."""
    found, _, mend = error.replace("\n", " | ").rpartition("; ")
    return (found, mend) if found else (error, "")
