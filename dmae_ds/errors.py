"""Exceptions that end a command on purpose; `cli/main.py` turns them into one line and an exit code.

Every other exception is a bug of this program and keeps its traceback. `on_every_rank` is set where all ranks
raise the same error, so that one rank prints it.
"""


class UserError(ValueError):
    """A mistake that the user can fix: what was found, what was expected, what to do. Exit code 2."""

    on_every_rank = False
    of_one_rank = False  # only this rank can have met it, so it must print it


class RunFailed(RuntimeError):
    """The run broke (a loss was not finite, say): where, and which checkpoint is good. Exit code 1."""

    on_every_rank = False


class RankLost(RunFailed):
    """Another rank is gone or stuck. The process ends at once: leaving the group would wait for that rank."""


class Requeue(RunFailed):
    """The run was stopped by a signal and has saved; --resume auto continues it. Exit code 75."""


def line_of(error: UserError | RunFailed, *, place: str = "") -> str:
    """The one line that is printed for an error; place: which rank met it, `" (rank 3)"`."""
    kind = "stopped" if isinstance(error, Requeue) else "error"
    return f"dmae-ds: {kind}{place}: {error}"


def worker_failure(error: RuntimeError, *, where: str = "this machine") -> RunFailed | None:
    """Return what to say of a loader's worker process that ended; None if the error is about something else.

    torch raises such an error from its handler of SIGCHLD, wherever the main thread is at that moment.
    """
    if not str(error).startswith("DataLoader worker"):
        return None
    first_line = str(error).splitlines()[0].rstrip(". ")
    return RunFailed(f"{first_line} on {where}; if the machine is out of memory, lower data.num_workers")
