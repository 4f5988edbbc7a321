"""The command that starts a run on these nodes, tried with an all-reduce in place of training.

A start that hangs is never sent a signal: on SIGTERM DeepSpeed's multi-node runner kills every launcher of
the user on every node, also those of other runs. Its processes on this machine are killed as one group, and
the ranks by the round `leave`, which looks for this doctor's word on their command lines; both also end by
themselves.
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
from dmae_ds.doctor.check import FAIL, OK, Check, join_names
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.reach import end_group, start_group
from dmae_ds.output.units import size_text

ALLREDUCE_BYTES = 64 * 2**20  # without a recipe
ALLREDUCE = "dmae_ds.doctor.allreduce"
MAX_MESSAGE = 200  # characters of a rank's error


@dataclass(frozen=True)
class Launch:
    """How ranks are started.

    kind: alone, pdsh, no_ssh (DeepSpeed's launcher on every node), torchrun (on every node)
    """

    kind: str
    nodes: list[Node]
    port: int
    address: str | None = None
    hostfile: str | None = None
    node_rank: int = 0

    @property
    def world(self) -> int:
        return sum(node.slots for node in self.nodes)

    @property
    def sees_first_rank(self) -> bool:
        """Whether the output of rank 0 arrives on this machine."""
        return self.node_rank == 0 or self.kind in ("alone", "pdsh")

    def words(self, module: list[str]) -> list[str]:
        """The command line for a Python module and its arguments."""
        if self.kind == "torchrun":
            return [
                *("torchrun", "--nnodes", str(len(self.nodes)), "--node_rank", str(self.node_rank)),
                *("--nproc_per_node", str(self.nodes[0].slots)),
                *("--master_addr", str(self.address), "--master_port", str(self.port), "-m", *module),
            ]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        are_numbers = all(number.isdecimal() for number in visible)
        if self.kind == "alone" and visible[0] and not are_numbers:  # UUIDs, which the launcher cannot read
            return ["torchrun", "--standalone", "--nproc_per_node", str(self.world), "-m", *module]
        words = ["deepspeed", "-q"]
        if self.kind == "alone" and are_numbers:  # with --num_gpus the launcher would ignore the variable
            words += ["--include", f"localhost:{','.join(visible[: self.world])}"]
        elif self.kind == "alone":
            words += ["--num_gpus", str(self.world)]
        else:
            words += ["--hostfile", str(self.hostfile), "--master_addr", str(self.address)]
        if self.kind == "no_ssh":
            words += ["--no_ssh", "--node_rank", str(self.node_rank)]
        if self.kind == "pdsh" and os.environ.get("PDSH_SSH_ARGS_APPEND"):
            words.append("--no_ssh_check")  # DeepSpeed's own check calls ssh without these arguments
        return [*words, "--master_port", str(self.port), "--module", *module]

    def command(self, recipe: str | None, overrides: list[str]) -> str:
        """The command for a terminal."""
        train = ["train", recipe or "RECIPE", *overrides, "--resume", "auto"]
        if self.kind == "alone" and self.world == 1:
            return shlex.join(["dmae-ds", *train])
        command = shlex.join(self.words(["dmae_ds", *train]))
        appended = os.environ.get("PDSH_SSH_ARGS_APPEND") if self.kind == "pdsh" else None
        return f"PDSH_SSH_ARGS_APPEND={shlex.quote(appended)} {command}" if appended else command


def survives_pdsh(argument: str) -> bool:
    """Whether the shells on the nodes leave an argument unchanged.

    DeepSpeed (0.19.8) quotes only arguments with a blank.
    """
    if " " in argument:
        return not re.search(r"[$`\\\"!]", argument)
    return not re.search(r"[$`\\\"'*?;&|<>()!#]|^~|=~|\{[^}]*(,|\.\.)", argument)


def try_start(launch: Launch, *, num_bytes: int, word: str, limit_s: float, cwd: Path) -> Check:
    """Start every rank as a run would, and let them all-reduce."""
    options = ["--word", word, "--bytes", str(num_bytes), "--limit_s", f"{limit_s:g}"]
    words = launch.words([ALLREDUCE, *options])
    launcher = words[0]
    in_environment = Path(sys.executable).with_name(launcher)  # also where the environment is not activated
    words[0] = str(in_environment) if in_environment.exists() else shutil.which(launcher) or launcher
    try:
        process = start_group(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
        )
    except OSError as error:
        fix = "install deepspeed into this environment"
        return Check("start", FAIL, f"{words[0]}: {error.strerror}", fix)
    try:
        output, _ = process.communicate(timeout=limit_s)
        end = f"ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired as error:
        output, end = error.stdout or b"", f"did not come back within {limit_s:g} s"
    finally:
        end_group(process)
    return judge_start(output.decode(errors="replace"), end=end, launch=launch, ok=process.returncode == 0)


def judge_start(output: str, *, end: str, launch: Launch, ok: bool) -> Check:
    """Check what the ranks printed. end: how the start ended; ok: whether with exit code 0."""
    reports = [
        json.loads(line.partition(MARK)[2])
        for line in output.splitlines()
        if MARK in line and line.rstrip().endswith("}")
    ]
    if ok and not launch.sees_first_rank:
        return Check("start", OK, "this node's ranks took part")
    for report in reports:
        if ok and report["stage"] == "done" and report["rank"] == 0:
            return Check("start", OK, _describe_allreduce(report))
    started = {report["rank"] for report in reports if report["stage"] == "started"}
    joined = {report["rank"] for report in reports if report["stage"] == "joined"}
    detail = f"it {end}; {len(started)} of {launch.world} ranks started, {len(joined)} joined"
    if message := _last_error(output):
        detail += f"; {message[:MAX_MESSAGE]}"
    if "address already in use" in output.lower():
        return Check("start", FAIL, detail, "choose another --master_port")
    if len(started) == launch.world > len(joined) and launch.sees_first_rank:
        hosts = join_names(sorted({report["host"] for report in reports}))
        fix = (
            f"the ranks cannot reach each other: let all TCP ports through between {hosts}, "
            "and see `interface` above (gloo and NCCL use ports of their own)"
        )
        return Check("start", FAIL, detail, fix)
    words = launch.words([ALLREDUCE, "--word", "x", "--bytes", "1024", "--limit_s", "60"])
    return Check("start", FAIL, detail, f"try it yourself: {shlex.join(words)}")


def _describe_allreduce(report: dict) -> str:
    ranks, seconds, num_bytes = report["ranks"], report["seconds"], report["bytes"]
    # The busiest link of a ring carries 2 (n - 1) / n of the data.
    gbit = 2 * (ranks - 1) / ranks * num_bytes * 8 / seconds / 1e9
    return (
        f"{ranks} ranks all-reduce {size_text(num_bytes)} in {1000 * seconds:.4g} ms: "
        f"{gbit:.3g} Gbit/s a rank ({report['device']})"
    )


def _last_error(output: str) -> str:
    """The last line that reports an error, or else the last line; marked lines don't count."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and MARK not in line]
    errors = [line for line in lines if re.search("[Ee]rror|terminate called", line)]
    return (errors or lines or [""])[-1]
