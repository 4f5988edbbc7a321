"""The command that starts a run on these nodes; tried with an all-reduce in place of training, and printed at the end.

A start that doesn't come back is never sent a signal: on SIGTERM DeepSpeed's multi-node runner kills every launcher of
the user on every node, also those of other runs. Its processes here are killed as one group, and the ranks by a probe that looks
for this doctor's word; both also end by themselves.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.doctor.answer import MARK
from dmae_ds.doctor.check import FAIL, OK, Check, names
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.judge_recipe import size
from dmae_ds.doctor.reach import end_group, start_group

ALLREDUCE_BYTES = 64 * 2**20  # where no recipe says how many


@dataclass(frozen=True)
class Launch:
    """How ranks are started. kind: alone, pdsh, no_ssh (DeepSpeed's launcher on every node), torchrun (on every node)."""

    kind: str
    nodes: list[Node]
    port: int
    address: str | None = None
    hostfile: str | None = None
    node_rank: int = 0

    @property
    def world(self) -> int:
        return sum(node.slots for node in self.nodes)

    def words(self, module: list[str], *, quiet: bool = False) -> list[str]:
        """The command line for a Python module and its arguments."""
        if self.kind == "torchrun":
            nodes = [
                "--nnodes",
                str(len(self.nodes)),
                "--node_rank",
                str(self.node_rank),
                "--nproc_per_node",
                str(self.nodes[0].slots),
            ]
            return [
                "torchrun",
                *nodes,
                "--master_addr",
                str(self.address),
                "--master_port",
                str(self.port),
                "-m",
                *module,
            ]
        words = ["deepspeed", *(["-q"] if quiet else [])]
        if self.kind == "alone":
            words += ["--num_gpus", str(self.world)]
        else:
            words += ["--hostfile", str(self.hostfile), "--master_addr", str(self.address)]
        if self.kind == "no_ssh":
            words += ["--no_ssh", "--node_rank", str(self.node_rank)]
        if self.kind == "pdsh" and os.environ.get("PDSH_SSH_ARGS_APPEND"):
            words.append("--no_ssh_check")  # its own check calls ssh without them
        return [*words, "--master_port", str(self.port), "--module", *module]

    def command(self, recipe: str | None, overrides: list[str]) -> str:
        """What a person types."""
        train = ["train", recipe or "RECIPE", *overrides]
        if self.kind == "alone" and self.world == 1:
            return shlex.join(["dmae-ds", *train, "--resume", "auto"])
        added = os.environ.get("PDSH_SSH_ARGS_APPEND") if self.kind == "pdsh" else None
        return (f"PDSH_SSH_ARGS_APPEND={shlex.quote(added)} " if added else "") + shlex.join(
            self.words(["dmae_ds", *train, "--resume", "auto"])
        )


def survives_pdsh(argument: str) -> bool:
    """Whether an argument comes out of the shells on the nodes as it went in; DeepSpeed (0.19.8) quotes only those with a blank."""
    if " " in argument:
        return not re.search(r"[$`\\\"!]", argument)
    return not re.search(r"[$`\\\"'*?;&|<>()!#]|^~|=~|\{[^}]*(,|\.\.)", argument)


def try_start(launch: Launch, *, num_bytes: int, word: str, limit_s: float, cwd: Path) -> Check:
    """Start every rank the real way and let them all-reduce."""
    words = launch.words(
        ["dmae_ds.doctor.allreduce", "--word", word, "--bytes", str(num_bytes), "--limit_s", f"{limit_s:g}"],
        quiet=True,
    )
    beside = Path(sys.executable).with_name(words[0])  # of this environment, also where it is not activated
    words[0] = str(beside) if beside.exists() else shutil.which(words[0]) or words[0]
    try:
        process = start_group(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
        )
    except OSError as error:
        return Check(
            "start", FAIL, f"{words[0]}: {error.strerror}", "install deepspeed into this environment"
        )
    try:
        output, _ = process.communicate(timeout=limit_s)
        ended = f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"did not come back within {limit_s:g} s"
    finally:
        end_group(process)
    return judge_start(
        output.decode(errors="replace"), ended=ended, launch=launch, ok=process.returncode == 0
    )


def judge_start(output: str, *, ended: str, launch: Launch, ok: bool) -> Check:
    """What came of it, from what the ranks said."""
    said = [
        json.loads(line.partition(MARK)[2])
        for line in output.splitlines()
        if MARK in line and line.rstrip().endswith("}")
    ]
    done = next((item for item in said if item["stage"] == "done" and item["rank"] == 0), None)
    here = launch.node_rank == 0 or launch.kind in ("alone", "pdsh")
    if ok and not here:
        return Check("start", OK, "this node's ranks took part")
    if ok and done is not None:
        ranks, seconds = done["ranks"], done["seconds"]
        # What the busiest link of a ring carries: 2 (n - 1) / n of the data.
        gbit = 2 * (ranks - 1) / ranks * done["bytes"] * 8 / seconds / 1e9
        return Check(
            "start",
            OK,
            f"{ranks} ranks all-reduce {size(done['bytes'])} in {1000 * seconds:.4g} ms: {gbit:.3g} Gbit/s a rank ({done['device']})",
        )
    stages = {
        stage: {item["rank"] for item in said if item["stage"] == stage} for stage in ("started", "joined")
    }
    own = [line.strip() for line in output.splitlines() if line.strip() and MARK not in line]
    last = next(
        (line for line in reversed(own) if re.search("[Ee]rror|terminate called", line)), (own or [""])[-1]
    )
    text = f"it {ended}; {len(stages['started'])} of {launch.world} ranks started, {len(stages['joined'])} joined{f'; {last[:200]}' if last else ''}"
    if "address already in use" in output.lower():
        return Check("start", FAIL, text, "choose another --master_port")
    if len(stages["started"]) == launch.world > len(stages["joined"]) and here:
        hosts = names(sorted({item["host"] for item in said}))
        return Check(
            "start",
            FAIL,
            text,
            f"the ranks cannot talk: let all TCP ports through between {hosts}, and see `interface` above (gloo and NCCL use ports of their own)",
        )
    return Check(
        "start",
        FAIL,
        text,
        f"see for yourself: {shlex.join(launch.words(['dmae_ds.doctor.allreduce', '--word', 'x', '--bytes', '1024', '--limit_s', '60']))}",
    )
