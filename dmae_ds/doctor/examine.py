"""What the doctor with ssh (over_ssh.py) and without (without_ssh.py) have in common: the question, the judging in its order, the start, the last line."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.doctor import judge_machines as machines
from dmae_ds.doctor.check import FAIL, SKIP, Check, by_value, names, render, verdict_line
from dmae_ds.doctor.hostfile import Node, read_hostfile
from dmae_ds.doctor.judge_machines import Asked, Facts
from dmae_ds.doctor.judge_network import judge_interface, judge_master, judge_port
from dmae_ds.doctor.judge_recipe import judge_recipe
from dmae_ds.doctor.start import ALLREDUCE_BYTES, Launch, try_start
from dmae_ds.errors import UserError

NEEDED_BY_A_START = {"ssh", "pdsh", "python", "versions", "devices", "port", "master", "interface"}


@dataclass(frozen=True)
class Question:
    """The command line. node_rank None: this machine asks all others."""

    recipe: str | None
    overrides: list[str]
    hostfile: Path | None
    num_ranks: int | None
    port: int
    address: str | None
    node_rank: int | None
    num_nodes: int | None
    start: bool
    allow_pipe: bool
    limit_s: float


class Table:
    """The checks, each printed as soon as it is known."""

    def __init__(self, *, silent: bool = False):
        self.checks: list[Check] = []
        self._silent = silent

    def add(self, *checks: Check) -> None:
        self.checks += checks
        for check in checks if not self._silent else ():
            print(render(check), flush=True)

    def failed(self, among: set[str] | None = None) -> list[str]:
        return [
            check.name
            for check in self.checks
            if check.verdict == FAIL and (among is None or check.name in among)
        ]


def find_nodes(question: Question) -> list[Node]:
    """The hostfile's nodes; without one, this machine (several of unknown name, where --num_nodes says so)."""
    if question.hostfile is not None:
        nodes = read_hostfile(question.hostfile)
        if question.num_nodes not in (None, len(nodes)):
            raise UserError(
                f"--num_nodes {question.num_nodes}, but {question.hostfile} names {len(nodes)}; remove one of the two"
            )
        if question.num_ranks is not None:
            raise UserError(
                f"--num_gpus is of no use beside --hostfile; write slots={question.num_ranks} into {question.hostfile}"
            )
    else:
        slots = question.num_ranks or count_gpus(dict(os.environ)) or 1
        nodes = [
            Node(
                socket.gethostname()
                if index == question.node_rank or question.node_rank is None
                else f"node {index}",
                slots,
            )
            for index in range(question.num_nodes or 1)
        ]
    if question.node_rank is not None and not 0 <= question.node_rank < len(nodes):
        raise UserError(f"--node_rank {question.node_rank} of {len(nodes)} nodes; give 0 to {len(nodes) - 1}")
    return nodes


def count_gpus(environment: dict[str, str]) -> int:
    """Without a library, which would take seconds; the probe looks again."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return (
        len(list(Path("/dev").glob("nvidia[0-9]*")))
        if visible is None
        else len([part for part in visible.split(",") if part not in ("", "-1")])
    )


def judge(
    table: Table,
    facts: Facts,
    meetings: Facts,
    clocks: dict[str, tuple[float, float]],
    asked: Asked,
    *,
    port_is_judged: bool = False,
) -> None:
    """All checks that need no start."""
    if not facts:
        return
    table.add(
        machines.judge_versions(facts), machines.judge_code(facts), machines.judge_devices(facts, asked)
    )
    if not port_is_judged:
        table.add(judge_port(facts, asked))
    if len(asked.nodes) > 1:
        table.add(judge_master(facts, meetings, asked), judge_interface(facts, meetings, asked))
    table.add(*judge_recipe(facts, meetings, asked))
    shards = max(
        (
            part["shards"]
            for found in facts.values()
            for part in found.get("shards", {}).values()
            if isinstance(part, dict)
        ),
        default=0,
    )
    needs = next((found["needs"] for found in facts.values() if "batches" in found.get("needs", {})), {})
    if needs:
        needs = {**needs, "batches_a_node": needs["batches"] * max(node.slots for node in asked.nodes)}
    table.add(machines.judge_limits(facts, needs, shards))
    if len(asked.nodes) > 1:
        table.add(machines.judge_clocks(clocks))


def head(question: Question, nodes: list[Node]) -> None:
    """The first line."""
    num = sum(node.slots for node in nodes)
    where = by_value({node.name: node.slots for node in nodes})
    print(f"{question.recipe or 'no recipe'}, {num} rank{'' if num == 1 else 's'}: {where}", flush=True)


def look(question: Question, nodes: list[Node], index: int, *, word: str, port: int | None) -> dict:
    """A node's request for the first round. port: to be looked at on the first node; None: not at all."""
    return {
        "round": "look",
        "word": word,
        "index": index,
        "nodes": len(nodes),
        "slots": nodes[index].slots,
        "world": sum(node.slots for node in nodes),
        "port": port,
        "recipe": question.recipe,
        "overrides": question.overrides,
        "allow_pipe": question.allow_pipe,
    }


def later(name: str, request: dict, found: dict) -> dict:
    """The request for a later round, from the first one's and what it found."""
    folder = found.get("run_dir", {})
    return {**request, "round": name, "run_dir": folder.get("path"), "made": folder.get("made", [])}


def start(table: Table, question: Question, launch: Launch, facts: Facts, *, word: str, cwd: Path) -> None:
    """Add the check of a real start, or why there was none."""
    needs = next((found["needs"] for found in facts.values() if "gradients" in found.get("needs", {})), {})
    if reason := table.failed(NEEDED_BY_A_START):
        table.add(Check("start", SKIP, f"it cannot work: see {names(reason)}"))
    elif not question.start:
        table.add(Check("start", SKIP, "--no-start"))
    elif launch.world == 1:
        table.add(Check("start", SKIP, "one rank: nobody to talk to"))
    else:
        table.add(
            try_start(
                launch,
                num_bytes=needs.get("gradients", ALLREDUCE_BYTES),
                word=word,
                limit_s=question.limit_s,
                cwd=cwd,
            )
        )


def finish(table: Table, question: Question, launch: Launch) -> bool:
    """Print the count and, if all is well, the command; returns whether all is well."""
    if table.failed():
        print(f"\n{verdict_line(table.checks)}", flush=True)
        return False
    every = ", on every node with its own --node_rank" if launch.kind in ("no_ssh", "torchrun") else ""
    print(
        f"\n{verdict_line(table.checks)}; start with{every}:\n{launch.command(question.recipe, question.overrides)}",
        flush=True,
    )
    return True
