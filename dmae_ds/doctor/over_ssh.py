"""The doctor on one machine that asks all nodes over ssh, or only itself."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from dmae_ds.doctor import judge_machines as machines
from dmae_ds.doctor.check import FAIL, Check, names
from dmae_ds.doctor.examine import Question, Table, find_nodes, finish, head, judge, later, look, start
from dmae_ds.doctor.hostfile import exported_environment
from dmae_ds.doctor.judge_machines import Asked, Facts
from dmae_ds.doctor.reach import Reach, Trouble
from dmae_ds.doctor.start import Launch, survives_pdsh

MOST_ADDRESSES = 4  # of the first node, that others try


def examine(question: Question) -> bool:
    """Print every check, then the command or the count of failures; returns whether nothing failed. Raises UserError."""
    nodes, cwd = find_nodes(question), Path.cwd()
    over_ssh, hostfile = question.hostfile is not None, str(question.hostfile)
    exports = exported_environment(dict(os.environ), cwd=cwd, home=Path.home()) if over_ssh else {}
    reach = Reach(local=not over_ssh, limit_s=question.limit_s, exports=exports, cwd=cwd)
    asked = Asked(nodes, "pdsh" if over_ssh else "alone", question.address, question.port, question.recipe)
    word = secrets.token_hex(8)  # marks what is this doctor's: tokens, processes, the answer on the port
    table = Table()
    head(question, nodes)
    requests = {
        node.name: look(question, nodes, index, word=word, port=question.port)
        for index, node in enumerate(nodes)
    }
    facts: Facts = {}
    try:
        answers = reach.ask_all(requests)
        facts = {node: answer for node, answer in answers.items() if not isinstance(answer, Trouble)}
        if over_ssh:
            table.add(*machines.judge_ssh(answers, pdsh=_pdsh_version()))
        table.add(machines.judge_python(answers))
        first = nodes[0].name
        if asked.master_address is None and first in facts:
            asked = replace(asked, master_address=(facts[first]["network"].get("addresses") or [None])[0])
        meetings = _meet(reach, requests, facts, asked) if len(nodes) > 1 and facts else {}
        launch = Launch(asked.kind, nodes, question.port, asked.master_address, hostfile)
        if over_ssh and (
            changed := [
                word for word in [question.recipe or "", *question.overrides] if not survives_pdsh(word)
            ]
        ):
            table.add(
                Check(
                    "arguments",
                    FAIL,
                    f"the launcher leaves {names(changed)} to the shells on the nodes, which would change that",
                    "write it into the recipe file",
                )
            )
        judge(table, facts, meetings, {node: meeting["clock"] for node, meeting in meetings.items()}, asked)
        start(table, question, launch, facts, word=word, cwd=cwd)
    finally:
        if facts:
            reach.ask_all({node: later("leave", requests[node], found) for node, found in facts.items()})
    return finish(table, question, launch)


def _meet(reach: Reach, requests: dict[str, dict], facts: Facts, asked: Asked) -> Facts:
    """The second round: every node calls the first one, looks for the others' tokens, and says the time."""
    first = asked.nodes[0].name
    listening = first in facts and facts[first].get("port", {}).get("busy", "unknown") is None
    addresses = dict.fromkeys(
        filter(
            None,
            [asked.master_address, *facts.get(first, {}).get("network", {}).get("addresses", [])][
                : MOST_ADDRESSES + 1
            ],
        )
    )
    calls = {
        node: {**later("meet", requests[node], found), "addresses": list(addresses), "listening": listening}
        for node, found in facts.items()
    }
    if listening:
        with reach.listening(first, {**requests[first], "round": "listen"}):
            answers = reach.ask_all(calls)
    else:
        answers = reach.ask_all(calls)
    return {node: answer for node, answer in answers.items() if not isinstance(answer, Trouble)}


def _pdsh_version() -> str | None:
    if shutil.which("pdsh") is None:
        return None
    return subprocess.run(["pdsh", "-V"], capture_output=True, text=True, timeout=10).stdout
