"""The facts of one node, started on every node as `python -m dmae_ds.doctor.inspect_node REQUEST`.

It prints one marked line of JSON. REQUEST is JSON in base64, so that no shell changes it; its "round" is one
of:

    look      all that one node can find alone: versions, code, devices, network, port, recipe
    (inspect_recipe.py)
    listen    node 0: answer on the master port until the input ends
    meet      reach node 0, list the tokens that every node left in the run folder, read the clock
    leave     remove the token, end what a start left behind

This program does not judge, and a part that fails reports its error and leaves the others alone. Libraries
are imported
late: the later rounds should be quick, and `look` has to report that torch cannot be imported.
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
    """All facts that this node can find alone."""
    facts = {
        "hostname": socket.gethostname(),
        "machine": guarded(inspect_machine),
        "code": guarded(hash_code),
        "network": guarded(inspect_network),
    }
    if request["index"] == 0 and request["port"] is not None:
        facts["port"] = guarded(lambda: inspect_port(request["port"]))  # before a library opens one
    facts["versions"] = guarded(list_versions)
    facts["devices"] = guarded(inspect_devices)
    if request["recipe"] is not None:
        from dmae_ds.doctor.inspect_recipe import inspect_recipe

        facts |= inspect_recipe(request)
    return facts


def inspect_machine() -> dict:
    """Cores, free memory in bytes, free shared memory in bytes, and the limit of open files."""
    import psutil

    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().available,
        "shm": None if shm is None else shm.free,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def list_versions() -> dict:
    """Installed versions, those that setup.cfg asks for, and the interpreter."""
    from importlib import metadata

    versions = {"python": platform.python_version(), "dmae-ds": dmae_ds.__version__}
    requirements = read_requirements()
    for name in dict.fromkeys([*COMPARED, *(text.split()[0] for text in requirements)]):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    # The imported torch counts: a stray copy in front of the installed one has no metadata.
    import torch

    versions["torch"] = torch.__version__
    return {"found": versions, "asked": requirements, "executable": sys.executable}


def read_requirements() -> list[str]:
    """The requirements in setup.cfg, of a checkout or installed: "torch >= 2.6"."""
    import configparser
    from importlib import metadata

    setup = PACKAGE.parent / "setup.cfg"
    if setup.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup)
        return parser["options"]["install_requires"].split("\n")[1:]
    requirements = (text.partition(";") for text in metadata.requires("dmae-ds") or [])
    return [text.replace(">=", " >= ") for text, _, marker in requirements if "extra" not in marker]


def hash_code() -> dict:
    """A digest of every file that decides what a run does: the package, recipes, DeepSpeed files."""
    folders = [PACKAGE / "shipped_recipes", PACKAGE / "shipped_ds_configs"]  # when installed
    if not folders[0].is_dir():
        folders = [PACKAGE.parent / "launch" / "recipes", PACKAGE.parent / "ds_configs"]
    files = {str(path.relative_to(PACKAGE.parent)): path for path in PACKAGE.rglob("*.py")}
    for folder in folders:
        name = folder.name.removeprefix("shipped_")
        files |= {f"{name}/{path.name}": path for path in folder.iterdir() if path.is_file()}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for name, path in sorted(files.items())
        if path.suffix != ".pyc"
    }
    return {"folder": str(PACKAGE), "files": digests}


def inspect_devices() -> dict:
    """Names and memory of the GPUs in bytes, their driver, and the processes that use them."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    driver, processes = None, []
    if gpus and shutil.which("nvidia-smi"):
        driver = (_query_nvidia_smi("--query-gpu=driver_version") or [None])[0]
        processes = _query_nvidia_smi("--query-compute-apps=pid,process_name")
    return {"gpus": gpus, "driver": driver, "processes": processes}


def _query_nvidia_smi(query: str) -> list[str]:
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S)
    return done.stdout.splitlines() if done.returncode == 0 else []


def inspect_network() -> dict:
    """Interfaces that are up, the addresses of this host's name, and variables for gloo and NCCL."""
    import psutil

    states = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    interfaces = {
        name: [address.address for address in addresses if address.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in states and states[name].isup
    }
    try:
        own_name = sorted({item[4][0] for item in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        own_name = []
    # DeepSpeed takes the master's address from the first one that `hostname -I` prints.
    listed = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=CONNECT_S)
    return {
        "interfaces": interfaces,
        "own_name": own_name,
        "addresses": listed.stdout.split(),
        "asked": {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")},
    }


def inspect_port(number: int) -> dict:
    """Who listens on the master port: {"busy": None}, or {"busy": a description}."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            server.bind(("", number))
            return {"busy": None}
        except OSError as error:
            return {"busy": _describe_listener(number) or error.strerror}


def _describe_listener(number: int) -> str | None:
    """The process that listens on a port; None if it is another user's."""
    import psutil

    try:
        for item in psutil.net_connections("inet"):
            if item.status == psutil.CONN_LISTEN and item.laddr.port == number and item.pid:
                return f"process {item.pid}: {' '.join(psutil.Process(item.pid).cmdline())[:80]}"
    except psutil.Error:
        pass
    return None


def main(argv: list[str]) -> int:
    request = decode(argv[0])
    # If the process that asked is gone, nothing else ends this one.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(request["limit_s"]) + 5)
    arrived, start = time.time(), time.monotonic()
    if request["round"] == "look":
        answer = look(request)
    else:
        from dmae_ds.doctor import later_rounds

        answer = getattr(later_rounds, request["round"])(request)
    answer |= {"time": arrived, "took": time.monotonic() - start}
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
