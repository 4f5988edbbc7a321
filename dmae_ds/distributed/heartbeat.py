"""Who is alive, and at what: every rank reports to the launcher's store once a second; whoever is missing is named.

A collective that waits for a dead or stuck rank says at best that somebody is missing, and NCCL's says nothing to the
host at all. So each rank has a thread with a connection of its own to the store (MASTER_ADDR:MASTER_PORT, which rank 0 or
torchrun's agent serves): it writes what its rank is at, and reads the verdict: one line, the first that anybody wrote,
with which every rank ends.

    found by                    what                                                            after
    rank 0                      a rank that is silent: stopped, its machine gone, its link cut  timeout_s
    rank 0                      a rank that others wait for in a collective                     timeout_s
    the next rank of its node   a rank whose process is gone                                    a second or two
    rank 0, once a collective   the same, alone on its node                                     GONE_S
    broke
    every rank                  rank 0, which judges, or the store it serves                    as above
    the rank itself             its own exception                                               at once

Only rank 0 reads all: N readers of N reports would be N * N reads a second. A call to a store that no longer answers may
never return (a cut link sends nothing), so a second thread counts the seconds since the first one's last round.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta

from dmae_ds.distributed.missing import GONE_S, Report, judge
from dmae_ds.distributed.parent_process import ParentProcess

BEAT_S = 1.0
CONTINUE = "continue with --resume auto"
# The host stands in one of these calls while it waits for a collective; on a GPU, for the kernels before it too.
_WAITING_CALLS = (".wait(", ".synchronize(", ".item()", ".tolist()", ".cpu()")
_COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")


class Heartbeat:
    """A rank's report and its ear for the verdict; ends the process with exit code 1 and a line when there is one.

    The store must be up. `stop` it before the process group is left.
    life: a name that all ranks of this start share; where the store may outlive them, no other start has it (rendezvous.py)
    timeout_s: bound on silence, and on waiting for a rank
    """

    def __init__(
        self, *, rank: int, size: int, local_rank: int, local_size: int, life: str, timeout_s: float
    ):
        self.rank, self.size, self.local_rank, self.life, self.timeout_s = (
            rank,
            size,
            local_rank,
            life,
            timeout_s,
        )
        self._host, self._launcher = socket.gethostname(), ParentProcess()
        self._place = f"{self._host}/{os.stat('/proc/self/ns/pid').st_ino if os.path.exists('/proc/self/ns/pid') else 0}"
        self._neighbour = rank - local_rank + (local_rank + 1) % local_size
        self._main = threading.main_thread().ident
        # What the rank's own thread tells these two.
        self._step, self._doing, self._since, self._broken = 0, "starting", time.monotonic(), ""
        self._done, self._reason, self._told, self._wake = False, None, threading.Event(), threading.Event()
        # What the first thread tells the second one.
        self._rounds, self._zero = 0, Report(0)
        self._waits_since: tuple[float, float] | None = None
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it came)
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat-{target.__name__}", daemon=True)
            for target in (self._beat, self._count)
        ]
        for thread in self._threads:
            thread.start()

    def report(self, step: int, doing: str) -> None:
        """Say what the rank turns to: `step` counts the finished ones."""
        self._step, self._doing, self._since = step, doing, time.monotonic()

    def ask(self, broken: str) -> None:
        """A collective broke ("closed" or "timed out"): find out who is missing. Ends the process; returns only where nobody is found."""
        self._broken = broken
        self._wake.set()
        time.sleep(3 * GONE_S)

    def fail(self, reason: str) -> None:
        """Tell the others that this rank ends, and why; returns when that is known, or can't be made known."""
        self._reason = (
            f"rank {self.rank} ({self._host}) ended after step {self._step}, {self._doing}: {reason}"
        )
        self._wake.set()
        self._told.wait(2 * GONE_S)

    def stop(self) -> None:
        """End watching: from here on nobody is missed. Meant for a moment when every rank does."""
        self._done = True
        self._wake.set()
        # An interpreter that ends while a thread is still in the store's C++ aborts.
        self._threads[0].join(self.timeout_s)

    # The first thread: the only one that talks to the store.

    def _beat(self) -> None:
        from torch import distributed

        try:
            self._connect()
            beats = 0
            while not self._done:
                beats += 1
                self._write(beats)
                self._read()
                self._rounds += 1
                self._wake.wait(0.05 if self._reason else BEAT_S)
                self._wake.clear()
            self._write(-1)
        except distributed.DistError as error:
            self._lose_the_store(str(error).splitlines()[0])
        except Exception:  # a bug of ours; unwatched ranks would be worse than none
            traceback.print_exc()
            os._exit(1)
        finally:
            self._told.set()

    def _connect(self) -> None:
        from torch import distributed

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=self.timeout_s), wait_for_workers=False
        )
        self._store = distributed.PrefixStore(f"dmae-ds/{self.life}", store)

    def _write(self, beats: int) -> None:
        now, waits_s = time.monotonic(), 0.0
        if not self._waits():
            self._waits_since = None
        elif self._waits_since is None or self._waits_since[0] != self._since:
            self._waits_since = (self._since, now)
        else:
            waits_s = now - self._waits_since[1]
        self._store.set(
            str(self.rank),
            json.dumps(
                {
                    "beats": beats,
                    "host": self._host,
                    "pid": os.getpid(),
                    "place": self._place,
                    "step": self._step,
                    "doing": self._doing,
                    "idle_s": now - self._since,
                    "waits_s": waits_s,
                    "broken": self._broken,
                }
            ),
        )

    def _waits(self) -> bool:
        """Whether this rank stands in a collective, as far as its frames show."""
        frames = sys._current_frames()
        for number, frame in frames.items():
            if any(part in frame.f_code.co_filename for part in _COLLECTIVES):
                return True
            if number == self._main and any(
                call in _line(frame.f_code.co_filename, frame.f_lineno) for call in _WAITING_CALLS
            ):
                return True
        return False

    def _read(self) -> None:
        """Look for a verdict, and for a reason for one."""
        if self._reason is not None:
            return self._end(self._reason, own=True, num_lost=0)
        found = self._get("verdict")
        if found is not None:
            return self._end(found, own=False, num_lost=1)
        everybody = range(self.size) if self.rank == 0 else sorted({0, self._neighbour})
        reports = {}
        for rank in everybody:
            if rank != self.rank and (said := self._get(str(rank))) is not None:
                said = json.loads(said)
                if said["beats"] == -1:  # at its end
                    continue
                report = reports[rank] = self._report(rank, said)
                if rank == self._neighbour and said["place"] == self._place and _is_gone(said["pid"]):
                    return self._end(f"{report.name()} is gone; {report.last()}", own=True, num_lost=1)
        if self.rank == 0:
            reports[0] = self._report(0, json.loads(self._get("0")))
        elif 0 in reports:
            self._zero = reports[0]
            # Rank 0's waiting and its judgement are its own; what it can't judge is its own silence.
            reports = {0: Report(**{**vars(reports[0]), "waits_s": 0.0, "idle_s": 0.0})} | (
                {self.rank: Report(self.rank, broken="closed")} if self._broken else {}
            )
        verdict = judge(list(reports.values()), timeout_s=self.timeout_s) if reports else None
        if verdict is not None:
            self._end(verdict, own=True, num_lost=int(not verdict.startswith("rank 0 ")))

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _report(self, rank: int, said: dict) -> Report:
        now = time.monotonic()
        beats, heard = self._heard.get(rank, (None, now))
        if beats != said["beats"]:
            heard = now
        self._heard[rank] = said["beats"], heard
        return Report(
            rank,
            silent_s=now - heard,
            **{name: said[name] for name in ("host", "step", "doing", "idle_s", "waits_s", "broken")},
        )

    def _end(self, verdict: str, *, own: bool, num_lost: int) -> None:
        """Publish a verdict, wait until it is read by all but num_lost if the store may end with this process, and go."""
        if own:
            verdict = self._store.compare_set("verdict", "", verdict).decode()
        if self.rank != 0:
            self._store.add("read", 1)
        end = time.monotonic() + GONE_S
        while (
            self.rank == 0
            and time.monotonic() < end
            and self._store.add("read", 0) < self.size - 1 - num_lost
        ):
            time.sleep(0.05)
        if self._reason is not None:
            self._done = True  # the rank's own thread says it, and ends the process
        else:
            self._say(verdict, own=own)

    def _lose_the_store(self, error: str) -> None:
        if self._done:
            return
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._say(f"{self._zero.name()} is gone ({error}); {self._zero.last()}", own=True)
        # No rank need be gone: let them save, as long as the second thread has patience.
        self._stop_soon(f"torchrun's agent at {os.environ['MASTER_ADDR']} is gone ({error})")

    # The second thread: never waits for anybody.

    def _count(self) -> None:
        rounds, quiet, launched = 0, 0, True
        while not self._done:
            time.sleep(BEAT_S)
            # Ticks are counted, not time: a process that was stopped and goes on must not blame the others.
            quiet = 0 if self._rounds != rounds else quiet + 1
            rounds = self._rounds
            if quiet * BEAT_S > self.timeout_s and not self._done:
                self._say(
                    f"{self._zero.name()} has not been heard of for {quiet * BEAT_S:.0f} s; {self._zero.last()}",
                    own=True,
                )
            if launched and self._launcher.is_gone():
                launched = False
                self._stop_soon("what started it is gone")

    def _stop_soon(self, reason: str) -> None:
        os.write(2, f"\ndmae-ds: {reason}; rank {self.rank} ({self._host}) stops as on SIGTERM\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    def _say(self, verdict: str, *, own: bool) -> None:
        """End the process: a line from whoever found it, and one a node. Past all locks, which a stuck thread may hold."""
        if own or self.local_rank == 0:
            os.write(
                2,
                f"\ndmae-ds: error{f' (rank {self.rank})' if self.rank else ''}: {verdict}; {CONTINUE}\n".encode(),
            )
        os._exit(1)


@functools.lru_cache(maxsize=1024)
def _line(filename: str, number: int | None) -> str:
    """A line of a source file, "" where there is none. linecache is not made for a second thread."""
    if not number:  # a frame that is just being entered
        return ""
    try:
        with open(filename, encoding="utf-8", errors="replace") as file:
            return next(itertools.islice(file, number - 1, None), "")
    except OSError:
        return ""


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended; one that its parent hasn't looked after yet has."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return os.path.exists("/proc/self/stat")
    except ProcessLookupError:
        return True
