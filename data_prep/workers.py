"""Worker processes that end when the process that started them ends, however that happens.

Workers of concurrent.futures wait forever if their parent is killed, and would still write while the resumed
run does. These see the end of their pipe, and check between samples whether their parent still exists
(`check_parent`). They are forked before anything large is in memory, so none of them holds a copy of the
listing.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any

from dmae_ds.data.shards import ShardError

AHEAD = 2  # jobs sent to each worker: one to do, and the next, so that it does not wait for the answer
_parent_pid = None


class Workers:
    """Processes that work on jobs: `with Workers(work, count) as workers: for result in workers.run(jobs)`.

    work: job -> (result, commit); commit() runs in a thread while the next job is done, then the result is
    sent

    Exceptions of both are raised by `run`; it raises ShardError if a worker dies.
    """

    def __init__(self, work: Callable[[Any], tuple[Any, Callable[[], None]]], count: int):
        forks = sys.platform == "linux"
        context = multiprocessing.get_context("fork" if forks else "spawn")
        self._processes, self._pipes = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            # a worker that holds our ends would never see them close
            inherited = list(self._pipes) if forks else []
            process = context.Process(target=_serve, args=(theirs, work, os.getpid(), inherited), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()  # nothing is lost: finished shards have their final names
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            pipe.close()

    def run(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """Yield results as they become ready; work starts at once, before the first is requested."""
        jobs = iter(jobs)
        waiting = dict.fromkeys(self._pipes, 0)
        for _ in range(AHEAD):
            for pipe in self._pipes:
                waiting[pipe] += self._send(pipe, jobs)
        return self._collect(jobs, waiting)

    def _collect(self, jobs: Iterator[Any], waiting: dict[Connection, int]) -> Iterator[Any]:
        while any(waiting.values()):
            for pipe in wait([pipe for pipe, number in waiting.items() if number]):
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise _died() from None
                if isinstance(result, BaseException):
                    raise result
                waiting[pipe] += self._send(pipe, jobs) - 1
                yield result

    @staticmethod
    def _send(pipe: Connection, jobs: Iterator[Any]) -> int:
        for job in jobs:
            try:
                pipe.send(job)
            except BrokenPipeError:
                raise _died() from None
            return 1
        return 0


def check_parent() -> None:
    """End this worker if the process that started it has ended."""
    if _parent_pid is not None and os.getppid() != _parent_pid:
        os._exit(1)


def _serve(pipe: Connection, work: Callable, parent_pid: int, inherited: list[Connection]) -> None:
    global _parent_pid
    _parent_pid = parent_pid
    for other in inherited:
        other.close()
    # Ctrl-C reaches the whole group, and the main process ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    previous: Future | None = None
    with ThreadPoolExecutor(1) as thread:
        while True:
            try:
                job = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            try:
                result, commit = work(job)
                if previous is not None:
                    previous.result()  # at most one shard waits for the disk
                previous = thread.submit(_commit, pipe, result, commit)
            except BaseException as error:
                _send(pipe, _portable(error))


def _commit(pipe: Connection, result: Any, commit: Callable[[], None]) -> None:
    try:
        commit()
    except BaseException as error:
        result = _portable(error)
    _send(pipe, result)


def _send(pipe: Connection, result: Any) -> None:
    try:
        pipe.send(result)
    except OSError:  # the main process has ended
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be sent to the main process; bugs keep their traceback as text."""
    if isinstance(error, ShardError | OSError):
        return error
    return RuntimeError("in a worker: " + "".join(traceback.format_exception(error)))


def _died() -> ShardError:
    return ShardError("a worker died (out of memory?); run the same command with fewer --workers to continue")
