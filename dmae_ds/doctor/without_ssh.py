"""The doctor on nodes that cannot ssh to each other: it runs on all at once, and the first one prints."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path

from dmae_ds.doctor.answer import guarded
from dmae_ds.doctor.check import FAIL, OK, Check, render
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
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.inspect_node import inspect_port
from dmae_ds.doctor.judge_machines import Target
from dmae_ds.doctor.judge_network import judge_port
from dmae_ds.doctor.meeting import Meeting
from dmae_ds.doctor.reach import Reach, Trouble
from dmae_ds.doctor.start import Launch
from dmae_ds.errors import RunFailed, UserError


def examine(question: Question) -> bool:
    """Do this node's part; returns whether no check failed, the same on every node.

    Raises UserError; RunFailed if nodes don't meet.
    """
    if question.address is None:
        raise UserError("--no_ssh requires --master_addr, an address of node 0 that the others reach")
    nodes, index, cwd = find_nodes(question), question.node_rank, Path.cwd()
    kind = "torchrun" if question.hostfile is None else "no_ssh"
    table = Table(silent=index != 0)
    if index == 0:
        print_head(question, nodes)
        port = guarded(lambda: inspect_port(question.port))
        target = Target(nodes, kind, question.address, question.port, question.recipe)
        table.add(judge_port({nodes[0].name: {"port": port}}, target))
        if table.failed():
            return finish(table, question, Launch(kind, nodes, question.port))
    meeting = Meeting(question.address, question.port, index=index, size=len(nodes), limit_s=question.limit_s)
    nodes, word = _take_seats(meeting, question, nodes)
    name = nodes[index].name
    launch = Launch(kind, nodes, question.port, question.address, str(question.hostfile), index)
    target = Target(nodes, kind, question.address, question.port, question.recipe)
    reach = Reach(local=True, limit_s=question.limit_s, cwd=cwd)
    request = make_request(question, nodes, index, word=word, port=None)
    mine = reach.ask(name, request)
    if isinstance(mine, Trouble):
        mine = {"trouble": [f"{name}: {mine.what}", mine.fix]}
    try:
        answers = meeting.gather("facts", mine)
        facts = {node.name: part for node, part in zip(nodes, answers, strict=True) if "trouble" not in part}
        meetings = _meet(meeting, reach, question, nodes, make_later_request("meet", request, mine), mine)
        clocks = meeting.gather("clock", meeting.compare_clocks())
        clocks_by_node = {node.name: clock for node, clock in zip(nodes, clocks, strict=True)}
        _check_python(table, answers)
        judge(table, facts, meetings, clocks_by_node, target, port_is_judged=True)
        meeting.close()  # the ranks meet at the same port
        check_start(table, question, launch, facts, word=word, cwd=cwd)
    finally:
        if "trouble" not in mine:
            reach.ask(name, make_later_request("leave", request, mine))
    if index == 0:
        return finish(table, question, launch)
    failures = [render(check) for check in table.checks if check.verdict == FAIL]
    print("\n".join(failures) or "nothing failed; node 0 prints the checks and the command", flush=True)
    return not table.failed()


def _take_seats(meeting: Meeting, question: Question, nodes: list[Node]) -> tuple[list[Node], str]:
    """Exchange names and slots; returns the nodes of the run and the word of this doctor."""
    seat = {
        "word": secrets.token_hex(8),
        "host": socket.gethostname(),
        "slots": nodes[meeting.index].slots,
    }
    seats = meeting.gather("seat", seat)
    if question.hostfile is None:
        nodes = [Node(seat["host"], seat["slots"]) for seat in seats]
    names = [node.name for node in nodes]
    if len(set(names)) < len(names):
        raise RunFailed(f"two nodes are called {', '.join(names)}; give each its own host name")
    return nodes, seats[0]["word"]


def _meet(
    meeting: Meeting, reach: Reach, question: Question, nodes: list[Node], request: dict, mine: dict
) -> dict[str, dict]:
    """Do the second round on every node; returns {node: tokens it sees and its address}."""
    answer = None
    if "trouble" not in mine:
        call = {"port": question.port, "addresses": [question.address], "listening": False}
        answer = reach.ask(nodes[meeting.index].name, {**request, **call})
    answers = meeting.gather("meet", None if isinstance(answer, Trouble) else answer)
    return {node.name: answer for node, answer in zip(nodes, answers, strict=True) if answer is not None}


def _check_python(table: Table, answers: list[dict]) -> None:
    troubles = [answer["trouble"] for answer in answers if "trouble" in answer]
    if troubles:
        table.add(Check("python", FAIL, *troubles[0]))
    else:
        table.add(Check("python", OK, f"{len(answers)} nodes met and reported their facts"))
