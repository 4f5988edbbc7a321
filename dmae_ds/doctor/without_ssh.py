"""The doctor where nodes cannot ssh to each other: it runs on all of them at once, and the first one judges and prints."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from dmae_ds.doctor.answer import guarded
from dmae_ds.doctor.check import FAIL, OK, Check, render
from dmae_ds.doctor.examine import Question, Table, find_nodes, finish, head, judge, later, look, start
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.judge_machines import Asked
from dmae_ds.doctor.judge_network import judge_port
from dmae_ds.doctor.meeting import Meeting
from dmae_ds.doctor.probe import port
from dmae_ds.doctor.reach import Reach, Trouble
from dmae_ds.doctor.start import Launch
from dmae_ds.errors import RunFailed, UserError


def examine(question: Question) -> bool:
    """This node's part; returns whether nothing failed, on every node the same. Raises UserError; RunFailed where nodes don't meet."""
    if question.address is None:
        raise UserError("--no_ssh needs --master_addr, an address of node 0 that the others reach")
    nodes, index, cwd = find_nodes(question), question.node_rank, Path.cwd()
    kind = "torchrun" if question.hostfile is None else "no_ssh"
    table = Table(silent=index != 0)
    if index == 0:
        head(question, nodes)
        free = guarded(lambda: port(question.port))
        asked = Asked(nodes, kind, question.address, question.port, question.recipe)
        table.add(judge_port({nodes[0].name: {"port": free}}, asked))
        if table.failed():
            return finish(table, question, Launch(kind, nodes, question.port))
    meeting = Meeting(question.address, question.port, index=index, size=len(nodes), limit_s=question.limit_s)
    seats = meeting.gather(
        "seat", {"word": secrets.token_hex(8), "host": socket.gethostname(), "slots": nodes[index].slots}
    )
    word = seats[0]["word"]
    if question.hostfile is None:
        nodes = [Node(seat["host"], seat["slots"]) for seat in seats]
    if len({node.name for node in nodes}) < len(nodes):
        raise RunFailed(
            f"two nodes are called {', '.join(node.name for node in nodes)}; give each its own host name"
        )
    launch = Launch(kind, nodes, question.port, question.address, str(question.hostfile), index)
    asked = Asked(nodes, kind, question.address, question.port, question.recipe)
    reach = Reach(local=True, limit_s=question.limit_s, cwd=cwd)
    request = look(question, nodes, index, word=word, port=None)
    mine = reach.ask(nodes[index].name, request)
    if isinstance(mine, Trouble):
        mine = {"trouble": [f"{nodes[index].name}: {mine.what}", mine.mend]}
    try:
        found = meeting.gather("facts", mine)
        facts = {node.name: part for node, part in zip(nodes, found, strict=True) if "trouble" not in part}
        call = {
            **later("meet", request, mine),
            "port": question.port,
            "addresses": [question.address],
            "listening": False,
        }
        answer = reach.ask(nodes[index].name, call) if "trouble" not in mine else None
        answers = meeting.gather("meet", None if isinstance(answer, Trouble) else answer)
        clocks = dict(
            zip([node.name for node in nodes], meeting.gather("clock", meeting.clock()), strict=True)
        )
        _judge_probes(table, nodes, found)
        meetings = {
            node.name: answer for node, answer in zip(nodes, answers, strict=True) if answer is not None
        }
        judge(table, facts, meetings, clocks, asked, port_is_judged=True)
        meeting.close()  # the ranks meet at the same port
        start(table, question, launch, facts, word=word, cwd=cwd)
    finally:
        if "trouble" not in mine:
            reach.ask(nodes[index].name, later("leave", request, mine))
    if index == 0:
        return finish(table, question, launch)
    print(
        "\n".join(render(check) for check in table.checks if check.verdict == FAIL)
        or "nothing failed; node 0 prints the checks and the command",
        flush=True,
    )
    return not table.failed()


def _judge_probes(table: Table, nodes: list[Node], found: list[dict]) -> None:
    troubles = [part["trouble"] for part in found if "trouble" in part]
    table.add(
        Check("python", FAIL, *troubles[0])
        if troubles
        else Check("python", OK, f"{len(nodes)} nodes met, and the probe ran on each")
    )
