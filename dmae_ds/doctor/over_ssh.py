"""The doctor on one machine that asks all nodes over ssh, or only itself."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from dmae_ds.doctor import judge_machines as machines
from dmae_ds.doctor.check import FAIL, Check, join_names
from dmae_ds.doctor.checklist import (
    Question,
    Table,
    check_start,
    find_nodes,
    finish,
    judge,
    make_later_request,
    make_request,
    print_head,
)
from dmae_ds.doctor.hostfile import read_exports
from dmae_ds.doctor.judge_machines import Facts, Target
from dmae_ds.doctor.reach import Reach, Trouble
from dmae_ds.doctor.start import Launch, survives_pdsh

MAX_ADDRESSES = 4  # of the first node, that the others try


def examine(question: Question) -> bool:
    """Print every check, then the command or the number of failures; returns whether none failed.

    Raises UserError for options, a hostfile or a .deepspeed_env that can't work.
    """
    nodes, cwd = find_nodes(question), Path.cwd()
    over_ssh = question.hostfile is not None
    exports = read_exports(dict(os.environ), cwd=cwd, home=Path.home()) if over_ssh else {}
    reach = Reach(local=not over_ssh, limit_s=question.limit_s, exports=exports, cwd=cwd)
    kind = "pdsh" if over_ssh else "alone"
    target = Target(nodes, kind, question.address, question.port, question.recipe)
    word = secrets.token_hex(
        8
    )  # marks what belongs to this doctor: tokens, processes, the answer on the port
    table = Table()
    print_head(question, nodes)
    requests = {
        node.name: make_request(question, nodes, index, word=word, port=question.port)
        for index, node in enumerate(nodes)
    }
    facts: Facts = {}
    try:
        answers = reach.ask_all(requests)
        facts = _without_troubles(answers)
        if over_ssh:
            table.add(*machines.judge_ssh(answers, pdsh=_pdsh_version()))
        table.add(machines.judge_python(answers))
        first = nodes[0].name
        if target.master_address is None and first in facts:
            addresses = facts[first]["network"].get("addresses") or [None]
            target = replace(target, master_address=addresses[0])
        meetings = _meet(reach, requests, facts, target) if len(nodes) > 1 and facts else {}
        clocks = {node: meeting["clock"] for node, meeting in meetings.items()}
        if over_ssh:
            _check_arguments(table, question)
        judge(table, facts, meetings, clocks, target)
        launch = Launch(kind, nodes, question.port, target.master_address, str(question.hostfile))
        check_start(table, question, launch, facts, word=word, cwd=cwd)
    finally:
        if facts:
            leave = {node: make_later_request("leave", requests[node], facts[node]) for node in facts}
            reach.ask_all(leave)
    return finish(table, question, launch)


def _without_troubles(answers: dict[str, dict | Trouble]) -> Facts:
    return {node: answer for node, answer in answers.items() if not isinstance(answer, Trouble)}


def _check_arguments(table: Table, question: Question) -> None:
    """Add a failed check for arguments that the shells on the nodes would change."""
    arguments = [question.recipe or "", *question.overrides]
    changed = [argument for argument in arguments if not survives_pdsh(argument)]
    if changed:
        detail = (
            f"the launcher doesn't quote {join_names(changed)}, and the shells on the nodes would change it"
        )
        table.add(Check("arguments", FAIL, detail, "write it into the recipe file"))


def _meet(reach: Reach, requests: dict[str, dict], facts: Facts, target: Target) -> Facts:
    """Ask for the second round: every node calls the first one, looks for tokens, and reports the time."""
    first = target.nodes[0].name
    facts_of_first = facts.get(first, {})
    listening = facts_of_first.get("port", {}).get("busy", "unknown") is None
    candidates = [target.master_address, *facts_of_first.get("network", {}).get("addresses", [])]
    addresses = list(dict.fromkeys(filter(None, candidates[: MAX_ADDRESSES + 1])))
    calls = {
        node: {
            **make_later_request("meet", requests[node], facts[node]),
            "addresses": addresses,
            "listening": listening,
        }
        for node in facts
    }
    if listening:
        with reach.listening(first, {**requests[first], "round": "listen"}):
            answers = reach.ask_all(calls)
    else:
        answers = reach.ask_all(calls)
    return _without_troubles(answers)


def _pdsh_version() -> str | None:
    if shutil.which("pdsh") is None:
        return None
    return subprocess.run(["pdsh", "-V"], capture_output=True, text=True, timeout=10).stdout
