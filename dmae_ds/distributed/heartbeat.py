"""Heartbeat: every rank reports to the launcher's store once a second, and a missing rank is named.

A collective that waits for a dead or stuck rank reports at best that some rank is missing; NCCL's reports
nothing to the host. So each rank has a thread with its own connection to the store (MASTER_ADDR:MASTER_PORT,
which rank 0 or torchrun's agent serves). It writes the rank's report and reads the verdict: one line, the
first that any rank wrote, with which every rank ends.

    detected by                 what                                                        after
    rank 0                      a silent rank: stopped, its machine gone, its link cut      timeout_s
    rank 0                      a rank that others wait for in a collective                 timeout_s
    the next rank of its node   a rank whose process has ended                              a second or two
    rank 0, once a collective   the same, if it was alone on its node                       GONE_S
    broke
    the next rank of its node   who an aborted rank waited for: NCCL's watchdog aborts one   GONE_S
    every rank                  rank 0, which judges, or the store that it serves           as above
    the rank itself             its own exception                                           at once

Only rank 0 reads all reports: N readers of N reports would be N * N reads a second. A call to a store that no
longer answers may never return (a cut link sends nothing), so a second thread counts the seconds since the
first one's last round.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
from datetime import timedelta

from dmae_ds.distributed.missing import ABORTED, GONE_S, Report, is_victim, judge, judge_alone
from dmae_ds.distributed.parent_process import ParentProcess
from dmae_ds.distributed.waiting import WaitDetector
from dmae_ds.output.lines import log

BEAT_S = 1.0
CONTINUE = "continue with --resume auto"


class Heartbeat:
    """Two threads that report this rank and read the verdict, with which they end the process (exit code 1).
    The store must be up. Call `stop` before the process group is destroyed.
    life: a name that the ranks of this start share and that no earlier start had (rendezvous.py)
    timeout_s: bound on silence, and on waiting for a rank
    on_gpu: whether this rank's tensors are on a GPU (waiting.py)
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        life: str,
        timeout_s: float,
        on_gpu: bool = False,
    ):
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.life = life
        self.timeout_s = timeout_s
        self._host = socket.gethostname()
        self._parent = ParentProcess()
        self._place = f"{self._host}/{_pid_namespace()}"  # process ids can be compared within it
        self._neighbour = rank - local_rank + (local_rank + 1) % local_size
        self._detector = WaitDetector(main=threading.main_thread().ident, on_gpu=on_gpu)
        # Written by the rank's own thread, read by these two.
        self._step = 0
        self._doing = "starting"
        self._since = time.monotonic()
        self._broken = ""
        self._done = False
        self._reason: str | None = None
        self._published = threading.Event()
        self._wake = threading.Event()
        # Written by the first thread, read by the second one.
        self._rounds = 0
        self._zero = Report(0)
        self._waits_since: tuple[float, float] | None = None
        self._waited_s = 0.0
        self._has_printed = False
        self._aborted: dict[int, float] = {}  # rank -> when it was found
        self._last_beats: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it came)
        self._threads = [
            threading.Thread(target=target, name=f"heartbeat-{target.__name__}", daemon=True)
            for target in (self._beat, self._count)
        ]
        for thread in self._threads:
            thread.start()

    def report(self, step: int, doing: str) -> None:
        """Set what the rank does now; `step` counts the finished steps."""
        self._step = step
        self._doing = doing
        self._since = time.monotonic()

    def ask(self, broken: str) -> None:
        """Find out who is missing after a collective broke ("closed" or "timed out"), and end the process.

        Returns only if no rank is found missing.
        """
        self._broken = broken
        self._wake.set()
        time.sleep(3 * GONE_S)

    def fail(self, reason: str) -> None:
        """Publish that this rank ends, and why; returns when the others know, or cannot be told."""
        self._reason = (
            f"rank {self.rank} ({self._host}) ended after step {self._step}, {self._doing}: {reason}"
        )
        self._wake.set()
        self._published.wait(2 * GONE_S)

    def stop(self) -> None:
        """Stop reporting and watching. Call it where every rank does."""
        self._done = True
        self._wake.set()
        # An interpreter that ends while a thread is still in the store's C++ code aborts.
        self._threads[0].join(self.timeout_s)

    # The first thread: the only one that uses the store.

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
        except Exception:  # a bug of ours: unwatched ranks would be worse than none
            traceback.print_exc()
            os._exit(1)
        finally:
            self._published.set()

    def _connect(self) -> None:
        from torch import distributed

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=self.timeout_s), wait_for_workers=False
        )
        self._store = distributed.PrefixStore(f"dmae-ds/{self.life}", store)

    def _write(self, beats: int) -> None:
        """Write this rank's report; -1 beats mean that it has ended."""
        now = time.monotonic()
        self._waited_s = 0.0
        if not self._detector.waits(sys._current_frames(), now=now):
            self._waits_since = None
        elif self._waits_since is None or self._waits_since[0] != self._since:
            self._waits_since = (self._since, now)
        else:
            self._waited_s = now - self._waits_since[1]
        report = {
            "beats": beats,
            "host": self._host,
            "pid": os.getpid(),
            "place": self._place,
            "step": self._step,
            "doing": self._doing,
            "idle_s": now - self._since,
            "waits_s": self._waited_s,
            "broken": self._broken,
        }
        self._store.set(str(self.rank), json.dumps(report))

    def _read(self) -> None:
        """Look for a verdict, or for a reason to write one."""
        if self._reason is not None:
            return self._end(self._reason, own=True, num_lost=0)
        verdict = self._get("verdict")
        if verdict is not None:
            return self._end(verdict, own=False, num_lost=1)
        reports = self._read_reports()
        if reports is None:
            return
        if self.rank == 0 or self._aborted:
            reports[self.rank] = self._report(self.rank, json.loads(self._get(str(self.rank))))
        elif 0 in reports:
            self._zero = reports[0]
            # Rank 0 judges its own waiting. What it cannot judge is its own silence.
            reports = {0: Report(**{**vars(reports[0]), "waits_s": 0.0, "idle_s": 0.0})}
            if self._broken:
                reports[self.rank] = Report(self.rank, broken="closed")
        verdict = judge(list(reports.values()), timeout_s=self.timeout_s) if reports else None
        if verdict is not None:
            num_lost = max(int(not verdict.startswith("rank 0 ")), len(self._aborted))
            self._end(verdict, own=True, num_lost=num_lost)

    def _read_reports(self) -> dict[int, Report] | None:
        """Reports of the ranks that this one watches; None where it has published a verdict, or looks on.

        Once a watched rank was aborted, all others are watched: one of them is the cause.
        """
        watched = range(self.size) if self.rank == 0 or self._aborted else sorted({0, self._neighbour})
        reports = {}
        for rank in watched:
            text = self._get(str(rank)) if rank != self.rank else None
            if text is None:
                continue
            fields = json.loads(text)
            if fields["beats"] == -1:  # has ended
                continue
            report = reports[rank] = self._report(rank, fields)
            is_near = rank == self._neighbour or bool(self._aborted)
            if not is_near or fields["place"] != self._place or not _is_gone(fields["pid"]):
                continue
            # Its parent may have collected it. On NCCL, its watchdog is the usual end of a rank that waits.
            killed_by = _killed_by(fields["pid"]) or ("SIGABRT" if self._detector.on_gpu else "")
            is_known = rank in self._aborted
            if not is_known and not is_victim(report, killed_by=killed_by, timeout_s=self.timeout_s):
                self._end(f"{report.name()} is gone; {report.last()}", own=True, num_lost=1)
                return None
            self._aborted.setdefault(rank, time.monotonic())
            reports[rank] = replace(report, broken=ABORTED)
        if self._aborted and time.monotonic() - min(self._aborted.values()) <= GONE_S + 2 * BEAT_S:
            return None  # the others' silence is not known yet
        return reports

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _report(self, rank: int, fields: dict) -> Report:
        now = time.monotonic()
        beats, since = self._last_beats.get(rank, (None, now))
        if beats != fields["beats"]:
            since = now
        self._last_beats[rank] = fields["beats"], since
        names = ("host", "step", "doing", "idle_s", "waits_s", "broken")
        return Report(rank, silent_s=now - since, **{name: fields[name] for name in names})

    def _end(self, verdict: str, *, own: bool, num_lost: int) -> None:
        """Publish a verdict and exit.

        Rank 0, which may serve the store, waits until all but num_lost ranks have read the verdict.
        """
        if own:
            verdict = self._store.compare_set("verdict", "", verdict).decode()
        if self._reason is None:
            self._print(verdict, own=own)  # at once: a launcher kills this rank when another one has ended
        if self.rank != 0:
            self._store.add("read", 1)
        end = time.monotonic() + GONE_S
        num_readers = self.size - 1 - num_lost
        while self.rank == 0 and time.monotonic() < end and self._store.add("read", 0) < num_readers:
            time.sleep(0.05)
        if self._reason is None:
            return self._exit(verdict, own=own)
        self._done = True  # the rank's own thread prints it, and ends the process

    def _lose_the_store(self, error: str) -> None:
        if self._done:
            return
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            own = Report(self.rank, self._host, self._step, self._doing, waits_s=self._waited_s)
            own = replace(own, idle_s=time.monotonic() - self._since)
            verdict = judge_alone(
                self._zero, own, error=error, has_watchdog=self._detector.on_gpu, timeout_s=self.timeout_s
            )
            self._exit(verdict, own=True)
        # All ranks may be alive: they may save until the second thread's time is up.
        self._stop_soon(f"torchrun's agent at {os.environ['MASTER_ADDR']} is gone ({error})")

    # The second thread: it never waits for another process.

    def _count(self) -> None:
        rounds = 0
        quiet = 0
        has_parent = True
        while not self._done:
            time.sleep(BEAT_S)
            # Ticks are counted, not time: a process that was stopped and continues must not accuse the
            # others.
            quiet = 0 if self._rounds != rounds else quiet + 1
            rounds = self._rounds
            if quiet * BEAT_S > self.timeout_s and not self._done:
                silence = f"has not reported for {quiet * BEAT_S:.0f} s"
                self._exit(f"{self._zero.name()} {silence}; {self._zero.last()}", own=True)
            if has_parent and self._parent.is_gone():
                has_parent = False
                self._stop_soon("the parent process is gone")

    def _stop_soon(self, reason: str) -> None:
        os.write(2, f"\ndmae-ds: {reason}; rank {self.rank} ({self._host}) stops as on SIGTERM\n".encode())
        os.kill(os.getpid(), signal.SIGTERM)

    def _exit(self, verdict: str, *, own: bool) -> None:
        """End the process with a line. It takes no locks, because a stuck thread may hold them."""
        self._print(verdict, own=own)
        os._exit(1)

    def _print(self, verdict: str, *, own: bool) -> None:
        """Print the first verdict, on the rank that wrote it and on one rank of each node."""
        if (own or self.local_rank == 0) and not self._has_printed:
            self._has_printed = True
            place = f" (rank {self.rank})" if self.rank else ""
            line = f"dmae-ds: error{place}: {verdict}; {CONTINUE}"
            log(line)
            os.write(2, f"\n{line}\n".encode())


def _pid_namespace() -> int:
    path = "/proc/self/ns/pid"
    return os.stat(path).st_ino if os.path.exists(path) else 0


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, also if its parent has not collected it yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return os.path.exists("/proc/self/stat")
    except ProcessLookupError:
        return True


def _killed_by(pid: int) -> str:
    """Name of the signal that ended a process; "" where its parent has collected it, or none is known."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            number = int(file.read().split()[-1]) & 0x7F  # the last field is the exit status
        return signal.Signals(number).name
    except (OSError, ValueError):
        return ""
