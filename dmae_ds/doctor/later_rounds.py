"""The short rounds after `look`: whether node 0 answers, the run folder is shared; the time; cleaning up."""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
import time
from functools import partial
from pathlib import Path

from dmae_ds.doctor.answer import CONNECT_S, MARK, guarded

VISIBLE_S = 5.0  # how long a node waits for the tokens of the others


def listen(request: dict) -> dict:
    """Answer every call on the master port with this doctor's word, until the input ends or the time is over.

    Only node 0 does so.
    """
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
    """Try the addresses of node 0, and list the nodes whose tokens are in the run folder.

    Without request["listening"] nothing is called, and only the addresses of this node are reported.
    """
    reached = {}
    for address in request["addresses"]:
        answer = {}
        if request["listening"]:
            answer = guarded(partial(call, address, request["port"], request["word"]))
        reached[address] = answer | {"from": find_source_address(address, request["port"])}
    tokens = guarded(lambda: {"seen": list_tokens(request)}) if request["run_dir"] else None
    return {"reached": reached, "tokens": tokens}


def list_tokens(request: dict) -> list[str]:
    """List the nodes whose tokens are in the run folder.

    Waits for all of them for some seconds, because NFS may list an older state at first.
    """
    end = time.monotonic() + VISIBLE_S
    while True:
        seen = sorted(path.name for path in token_folder(request).iterdir())
        if len(seen) >= request["nodes"] or time.monotonic() > end:
            return seen
        time.sleep(0.2)


def call(address: str, port: int, word: str) -> dict:
    """Call node 0; returns {}, or {"error": what happened}."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_S) as caller:
            answer = caller.recv(256).decode("ascii", "replace")
    except OSError as error:
        return {"error": error.strerror or "no answer"}
    return {} if answer == word else {"error": "another program answers there"}


def find_source_address(address: str, port: int) -> str | None:
    """The address of this node that packets to another address leave from; sends none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as packets:
            packets.connect((address, port))
            return packets.getsockname()[0]
    except OSError:
        return None


def token_folder(request: dict) -> Path:
    """The folder inside the run folder where each node leaves its token."""
    return Path(request["run_dir"]).expanduser() / f".doctor-{request['word']}"


def leave(request: dict) -> dict:
    """Remove the token and the folders made for it, and end what a start of this doctor left behind."""
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
    """Kill the all-reduce processes with this doctor's word on their command line; returns their number."""
    import psutil

    processes = []
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if word in arguments and any("dmae_ds.doctor.allreduce" in argument for argument in arguments):
            processes.append(process)
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue
    return len(processes)
