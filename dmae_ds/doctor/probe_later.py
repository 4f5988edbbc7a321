"""A probe's short rounds after `look`: does node 0 answer, is the run folder one and the same, what time is it, tidying up."""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
import time
from pathlib import Path

from dmae_ds.doctor.answer import CONNECT_S, MARK, guarded

VISIBLE_S = 5.0


def listen(request: dict) -> dict:
    """Node 0: answer every call on the master port with this doctor's word, until the input ends or the time is up."""
    end = time.monotonic() + request["limit_s"]
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", request["port"]))
        server.listen(1024)
        print(f'\n{MARK}{{"listening": true}}', flush=True)
        while time.monotonic() < end:
            ready, _, _ = select.select([server, sys.stdin], [], [], 1.0)
            if sys.stdin in ready and not os.read(sys.stdin.fileno(), 1024):
                break
            if server in ready:
                caller, _ = server.accept()
                with caller:
                    caller.sendall(request["word"].encode())
    return {}


def meet(request: dict) -> dict:
    """Which addresses of node 0 answer from here, by which own address, and whose tokens lie in the run folder.

    request["listening"] False: nobody is called, and only the own addresses are said.
    """
    reached = {}
    for address in request["addresses"]:
        reached[address] = (
            guarded(lambda: call(address, request["port"], request["word"])) if request["listening"] else {}
        )
        reached[address] |= {"from": own_address(address, request["port"])}
    tokens = guarded(lambda: {"seen": see_tokens(request)}) if request["run_dir"] else None
    return {"reached": reached, "tokens": tokens}


def see_tokens(request: dict) -> list[str]:
    """The nodes whose tokens lie in the run folder; waits a little for all, for NFS may show an older listing at first."""
    end = time.monotonic() + VISIBLE_S
    while True:
        seen = sorted(path.name for path in token_folder(request).iterdir())
        if len(seen) >= request["nodes"] or time.monotonic() > end:
            return seen
        time.sleep(0.2)


def call(address: str, port: int, word: str) -> dict:
    """{}, or {"error": what happened}."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as caller:
            said = caller.recv(256).decode("ascii", "replace")
    except OSError as error:
        return {"error": error.strerror or "no answer"}
    return {} if said == word else {"error": "another program answers there"}


def own_address(address: str, port: int) -> str | None:
    """The address that packets to another one leave from; none is sent."""
    try:
        with socket.socket(
            socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM
        ) as packets:
            packets.connect((address, port))
            return packets.getsockname()[0]
    except OSError:
        return None


def token_folder(request: dict) -> Path:
    return Path(request["run_dir"]).expanduser() / f".doctor-{request['word']}"


def leave(request: dict) -> dict:
    """Take the token away, with the folders that were made for it; end what a start of this doctor left behind."""
    ended = guarded(lambda: {"ended": end_processes(request["word"])})
    if request["run_dir"]:
        shutil.rmtree(token_folder(request), ignore_errors=True)
        for folder in request["made"]:  # the innermost first; only while they are empty
            try:
                Path(folder).rmdir()
            except OSError:
                break
    return ended


def end_processes(word: str) -> int:
    """Kill what carries this doctor's word on its command line, and is not the doctor: a start that never came back."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if word in line and any("dmae_ds.doctor.allreduce" in part for part in line):
            found.append(process)
    for process in found:
        try:
            process.kill()
        except psutil.Error:
            continue
    return len(found)
