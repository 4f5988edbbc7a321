"""The facts of one node. Started on every node as `python -m dmae_ds.doctor.probe REQUEST`; prints one marked line of JSON.

REQUEST is JSON in base64, so that no shell can change it; its "round" says what is wanted:

    look      everything that can be seen alone: versions, code, devices, network, port, recipe (probe_recipe.py)
    listen    node 0: answer on the master port until the input ends
    meet      reach node 0, list the tokens that every node left in the run folder, read the clock
    leave     take the token away, end what a start left behind

Nothing here judges, and a part that fails says so in its place and leaves the others alone. Libraries are imported late:
the later rounds are to be quick, and `look` has to tell that torch cannot be imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dmae_ds
from dmae_ds.doctor.answer import CONNECT_S, MARK, decode, guarded

COMPARED = ("torch", "deepspeed", "timm")
SMI_S = 20.0
PACKAGE = Path(dmae_ds.__file__).resolve().parent


def look(request: dict) -> dict:
    """Everything that can be seen from this node alone."""
    facts = {
        "hostname": socket.gethostname(),
        "machine": guarded(machine),
        "code": guarded(code),
        "network": guarded(network),
    }
    if request["index"] == 0 and request["port"] is not None:
        facts["port"] = guarded(lambda: port(request["port"]))  # before a library opens one
    facts["versions"] = guarded(versions)
    facts["devices"] = guarded(devices)
    if request["recipe"] is not None:
        from dmae_ds.doctor.probe_recipe import recipe

        facts |= recipe(request)
    return facts


def machine() -> dict:
    import psutil

    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().available,
        "shm": None if shm is None else shm.free,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def versions() -> dict:
    from importlib import metadata

    found = {"python": platform.python_version(), "dmae-ds": dmae_ds.__version__}
    asked = requirements()
    for name in dict.fromkeys([*COMPARED, *(text.split()[0] for text in asked)]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    # What is imported counts: a stray copy in front of the installed one has no metadata.
    import torch

    found["torch"] = torch.__version__
    return {"found": found, "asked": asked, "executable": sys.executable}


def requirements() -> list[str]:
    """What setup.cfg asks for, in a checkout or installed: "torch >= 2.6"."""
    import configparser
    from importlib import metadata

    setup = PACKAGE.parent / "setup.cfg"
    if setup.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup)
        return parser["options"]["install_requires"].split("\n")[1:]
    found = (text.partition(";") for text in metadata.requires("dmae-ds") or [])
    return [text.replace(">=", " >= ") for text, _, marker in found if "extra" not in marker]


def code() -> dict:
    """A digest of every file that decides what a run does: the package, recipes, DeepSpeed files."""
    shipped = [PACKAGE / "shipped_recipes", PACKAGE / "shipped_ds_configs"]
    folders = (
        shipped
        if shipped[0].is_dir()
        else [PACKAGE.parent / "launch" / "recipes", PACKAGE.parent / "ds_configs"]
    )
    files = {str(path.relative_to(PACKAGE.parent)): path for path in PACKAGE.rglob("*.py")}
    files |= {
        f"{folder.name.removeprefix('shipped_')}/{path.name}": path
        for folder in folders
        for path in folder.iterdir()
        if path.is_file()
    }
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for name, path in sorted(files.items())
        if path.suffix != ".pyc"
    }
    return {"folder": str(PACKAGE), "files": digests}


def devices() -> dict:
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    driver, processes = None, []
    if gpus and shutil.which("nvidia-smi"):
        driver = (_nvidia_smi("--query-gpu=driver_version") or [None])[0]
        processes = _nvidia_smi("--query-compute-apps=pid,process_name")
    return {"gpus": gpus, "driver": driver, "processes": processes}


def _nvidia_smi(query: str) -> list[str]:
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=SMI_S
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def network() -> dict:
    """Interfaces that are up, what this host's name means here, and what was asked of the collective libraries."""
    import psutil

    states = psutil.net_if_stats()
    interfaces = {
        name: [
            address.address for address in addresses if address.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }
    try:
        own = sorted({item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        own = []
    # `hostname -I`, which DeepSpeed takes the master's address from: the first one.
    listed = subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True, timeout=CONNECT_S
    ).stdout.split()
    return {
        "interfaces": interfaces,
        "own_name": own,
        "addresses": listed,
        "asked": {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
    }


def port(number: int) -> dict:
    """Who listens on the master port: {"busy": None}, or a description."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            server.bind(("", number))
            return {"busy": None}
        except OSError as error:
            return {"busy": _listener(number) or error.strerror}


def _listener(number: int) -> str | None:
    import psutil

    try:
        owners = [
            item.pid
            for item in psutil.net_connections("inet")
            if item.status == psutil.CONN_LISTEN and item.laddr.port == number and item.pid
        ]
        return (
            f"process {owners[0]}: {' '.join(psutil.Process(owners[0]).cmdline())[:80]}" if owners else None
        )
    except psutil.Error:
        return None  # somebody else's


def main(argv: list[str]) -> int:
    request = decode(argv[0])
    # If whoever asked is gone, nobody else ends this process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(request["limit_s"]) + 5)
    arrived, start = time.time(), time.monotonic()
    if request["round"] == "look":
        answer = look(request)
    else:
        from dmae_ds.doctor import probe_later

        answer = getattr(probe_later, request["round"])(request)
    answer |= {"time": arrived, "took": time.monotonic() - start}
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
