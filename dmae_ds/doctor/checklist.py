"""The steps that the doctor shares with ssh (over_ssh.py) and without it (without_ssh.py).

They are the question, the requests to the nodes, the checks in their order, the try of a start, and the last
line.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.doctor import judge_machines as machines
from dmae_ds.doctor.check import FAIL, SKIP, Check, count_verdicts, join_names, list_values, render
from dmae_ds.doctor.hostfile import Node, read_hostfile
from dmae_ds.doctor.judge_machines import Facts, Target
from dmae_ds.doctor.judge_network import judge_interface, judge_master, judge_port
from dmae_ds.doctor.judge_recipe import judge_recipe
from dmae_ds.doctor.start import ALLREDUCE_BYTES, Launch, try_start
from dmae_ds.errors import UserError

NEEDED_BY_A_START = {"ssh", "pdsh", "python", "versions", "devices", "port", "master", "interface"}


@dataclass(frozen=True)
class Question:
    """The command line. node_rank is None where this machine asks all others."""

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
        """Add checks and print them."""
        self.checks += checks
        for check in checks if not self._silent else ():
            print(render(check), flush=True)

    def failed(self, among: set[str] | None = None) -> list[str]:
        """Names of the failed checks, all or those among some names."""
        return [
            check.name
            for check in self.checks
            if check.verdict == FAIL and (among is None or check.name in among)
        ]


def find_nodes(question: Question) -> list[Node]:
    """The nodes of the hostfile; without one, this machine, and with --num_nodes others of unknown name.

    Raises UserError where options contradict each other.
    """
    if question.hostfile is not None:
        nodes = read_hostfile(question.hostfile)
        if question.num_nodes not in (None, len(nodes)):
            raise UserError(
                f"--num_nodes {question.num_nodes}, but {question.hostfile} names {len(nodes)}; "
                "remove one of the two"
            )
        if question.num_ranks is not None:
            raise UserError(
                f"--num_gpus {question.num_ranks} cannot be combined with --hostfile; "
                f"write slots={question.num_ranks} into {question.hostfile}"
            )
    else:
        slots = question.num_ranks or count_gpus(dict(os.environ)) or 1
        names = [f"node {index}" for index in range(question.num_nodes or 1)]
        here = question.node_rank or 0
        if here < len(names):
            names[here] = socket.gethostname()
        nodes = [Node(name, slots) for name in names]
    if question.node_rank is not None and not 0 <= question.node_rank < len(nodes):
        raise UserError(f"--node_rank {question.node_rank} of {len(nodes)} nodes; give 0 to {len(nodes) - 1}")
    return nodes


def count_gpus(environment: dict[str, str]) -> int:
    """Count the GPUs without a library, whose import would take seconds.

    inspect_node.py counts them again with torch.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([device for device in visible.split(",") if device not in ("", "-1")])


def judge(
    table: Table,
    facts: Facts,
    meetings: Facts,
    clocks: dict[str, tuple[float, float]],
    target: Target,
    *,
    port_is_judged: bool = False,
) -> None:
    """Add all checks that need no start."""
    if not facts:
        return
    table.add(
        machines.judge_versions(facts), machines.judge_code(facts), machines.judge_devices(facts, target)
    )
    if not port_is_judged:
        table.add(judge_port(facts, target))
    if len(target.nodes) > 1:
        table.add(judge_master(facts, meetings, target), judge_interface(facts, meetings, target))
    table.add(*judge_recipe(facts, meetings, target))
    needs = find_needs(facts, "batches")
    if needs:
        needs = {**needs, "batches_a_node": needs["batches"] * max(node.slots for node in target.nodes)}
    table.add(*machines.judge_cores(facts, needs.get("workers"), target))
    table.add(machines.judge_limits(facts, needs, _count_shards(facts)))
    if len(target.nodes) > 1:
        table.add(machines.judge_clocks(clocks))


def find_needs(facts: Facts, key: str) -> dict:
    """What the recipe needs, from the first node that knows this key of it; {} if none does."""
    return next((part["needs"] for part in facts.values() if key in part.get("needs", {})), {})


def _count_shards(facts: Facts) -> int:
    """The number of shards of the largest data set on any node."""
    data_sets = [data for part in facts.values() for data in part.get("shards", {}).values()]
    return max((data["shards"] for data in data_sets if isinstance(data, dict)), default=0)


def print_head(question: Question, nodes: list[Node]) -> None:
    """Print the first line: recipe, ranks and nodes."""
    num_ranks = sum(node.slots for node in nodes)
    slots = list_values({node.name: node.slots for node in nodes})
    plural = "" if num_ranks == 1 else "s"
    print(f"{question.recipe or 'no recipe'}, {num_ranks} rank{plural}: {slots}", flush=True)


def make_request(question: Question, nodes: list[Node], index: int, *, word: str, port: int | None) -> dict:
    """A node's request for the round `look`. port: the one to check on the first node; None to check none."""
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


def make_later_request(name: str, request: dict, facts: dict) -> dict:
    """The request for a later round, from the first one and the facts that answered it."""
    folder = facts.get("run_dir", {})
    return {**request, "round": name, "run_dir": folder.get("path"), "made": folder.get("made", [])}


def check_start(
    table: Table, question: Question, launch: Launch, facts: Facts, *, word: str, cwd: Path
) -> None:
    """Try a real start and add its check, or the reason why there was none."""
    if failed := table.failed(NEEDED_BY_A_START):
        table.add(Check("start", SKIP, f"it cannot work: see {join_names(failed)}"))
    elif not question.start:
        table.add(Check("start", SKIP, "--no-start"))
    elif launch.world == 1:
        table.add(Check("start", SKIP, "one rank has nothing to exchange"))
    else:
        num_bytes = find_needs(facts, "gradients").get("gradients", ALLREDUCE_BYTES)
        table.add(try_start(launch, num_bytes=num_bytes, word=word, limit_s=question.limit_s, cwd=cwd))


def finish(table: Table, question: Question, launch: Launch) -> bool:
    """Print the count and, if no check failed, the command; returns whether none failed."""
    print(f"\n{count_verdicts(table.checks)}", end="")
    if table.failed():
        print(flush=True)
        return False
    everywhere = ", on every node with its own --node_rank" if launch.kind in ("no_ssh", "torchrun") else ""
    print(f"; start with{everywhere}:\n{launch.command(question.recipe, question.overrides)}", flush=True)
    return True
