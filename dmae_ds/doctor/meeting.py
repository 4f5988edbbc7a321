"""The meeting of nodes without ssh, which run the doctor at once: a torch store on the master port.

A run's ranks meet at the same port and the same kind of store, so that the meeting is a check by itself.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from dmae_ds.errors import RunFailed

POLL_S = 0.1


class Meeting:
    """One node's place in the meeting.

    Every node must call the same methods in the same order; each raises RunFailed that names the missing
    nodes.
    """

    def __init__(self, address: str, port: int, *, index: int, size: int, limit_s: float):
        self.index, self.size, self.limit_s = index, size, limit_s
        try:
            if index > 0:
                wait_until_open(address, port, limit_s)
            with _quiet_torch():
                from torch.distributed import TCPStore
            self._store = TCPStore(
                address,
                port,
                is_master=index == 0,
                wait_for_workers=False,
                timeout=timedelta(seconds=limit_s),
            )
        except (OSError, RuntimeError) as error:  # torch's DistError is a RuntimeError
            problem = "this node cannot listen there"
            if index > 0:
                problem = f"node 0 does not answer within {limit_s:g} s"
            reason = str(error).splitlines()[0][:120]
            raise RunFailed(
                f"{address}:{port}: {problem} ({reason}); "
                "--master_addr must be node 0's, the port open, and the doctor running there"
            ) from None

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every node's value, in the order of the nodes."""
        self._store.set(f"{name}/{self.index}", json.dumps(value))
        end = time.monotonic() + self.limit_s
        missing = list(range(self.size))
        while missing := [index for index in missing if not self._store.check([f"{name}/{index}"])]:
            if time.monotonic() > end:
                raise RunFailed(
                    f"node {', '.join(map(str, missing))} did not come within {self.limit_s:g} s; "
                    "start the doctor on every node at about the same time, each with its own --node_rank"
                )
            time.sleep(POLL_S)
        return [json.loads(self._store.get(f"{name}/{index}")) for index in range(self.size)]

    def compare_clocks(self) -> tuple[float, float]:
        """How far this node's clock is ahead of node 0's, and the possible error of that, in seconds.

        One node asks after the other.
        """
        ahead, error = 0.0, 0.0
        for index in range(1, self.size):
            if self.index == 0:
                self._store.get(f"ask/{index}")
                self._store.set(f"time/{index}", repr(time.time()))
            elif index == self.index:
                start = time.time()
                self._store.set(f"ask/{index}", "")
                time_of_first = float(self._store.get(f"time/{index}"))
                end = time.time()
                ahead, error = (start + end) / 2 - time_of_first, (end - start) / 2
        return ahead, error

    def close(self) -> None:
        """Leave the meeting; node 0, which holds the store, leaves last, and then the port is free."""
        self._store.add("left", 1)
        end = time.monotonic() + self.limit_s
        while self.index == 0 and self._store.add("left", 0) < self.size and time.monotonic() < end:
            time.sleep(POLL_S)
        del self._store


def wait_until_open(address: str, port: int, limit_s: float) -> None:
    """Wait until the port answers, because nodes don't start at the same moment.

    Raises the last OSError after limit_s.
    """
    end = time.monotonic() + limit_s
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(5 * POLL_S)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence torch's C++ log, which warns of each address without a name; its level is read at import."""
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    yield
    if before is None:
        del os.environ["TORCH_CPP_LOG_LEVEL"]
    else:
        os.environ["TORCH_CPP_LOG_LEVEL"] = before
