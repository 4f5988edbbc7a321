"""The nodes of a run, and what DeepSpeed's launcher takes there: its hostfile and exported variables."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.errors import UserError

# deepspeed/launcher/runner.py (0.19.8) exports variables with these prefixes, and the lines of two files.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX")
EXPORTED_WITH_GPUS = ("NCCL",)
EXPECTED = "write one line a node: NAME slots=RANKS"


@dataclass(frozen=True)
class Node:
    """A line of a hostfile: a name, and how many ranks start there."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Node]:
    """Read the nodes of a hostfile, in their order.

    Raises UserError that names the line, where DeepSpeed would refuse it too.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--hostfile '{path}' cannot be read ({reason}); {EXPECTED}") from None
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line)
        if match is None or int(match[2]) == 0:
            raise UserError(
                f"{path}, line {number}: '{line}' is not a node; "
                "write NAME slots=RANKS, for example node1 slots=8"
            )
        if match[1] in nodes:
            raise UserError(
                f"{path}, line {number}: node {match[1]} is listed twice; "
                "give every node one line with all of its slots"
            )
        nodes[match[1]] = Node(match[1], int(match[2]))
    if not nodes:
        raise UserError(f"--hostfile '{path}' names no node; {EXPECTED}")
    return list(nodes.values())


def read_exports(environment: dict[str, str], *, cwd: Path, home: Path) -> dict[str, str]:
    """Read the variables that the `deepspeed` launcher sets on every node.

    They are some variables of this machine, then the lines of ~/.deepspeed_env and ./.deepspeed_env. Raises
    UserError for a line of these files that is not NAME=VALUE; DeepSpeed ends with a traceback there.
    """
    python_path = os.pathsep.join(filter(None, [str(cwd), environment.get("PYTHONPATH")]))
    environment = {**environment, "PYTHONPATH": python_path}
    prefixes = EXPORTED + EXPORTED_WITH_GPUS
    exported = {name: value for name, value in environment.items() if name.startswith(prefixes)}
    for path in environment_files(environment, cwd=cwd, home=home):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            name, equals, value = line.partition("=")
            if not equals or not name.strip():
                raise UserError(
                    f"{path}, line {number}: '{line}' is not NAME=VALUE, and DeepSpeed's launcher "
                    "stops there; remove it (blank lines too)"
                )
            exported[name.strip()] = value.strip()
    return exported


def environment_files(environment: dict[str, str], *, cwd: Path, home: Path) -> list[Path]:
    """List DeepSpeed's files of exported variables that exist; the later one overrides the earlier."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    return [path for path in dict.fromkeys((home / name, cwd / name)) if path.is_file()]
