"""The ways a command ends on purpose before it is done; `cli.py` turns them into one line and an exit code.

Everything else is a bug of ours and keeps its traceback. `on_every_rank` is set where all ranks raise the same error,
so that one of them tells it.
"""


class UserError(ValueError):
    """A mistake the user can mend: says what was found, what was expected and what to do. Exit code 2."""

    on_every_rank = False


class RunFailed(RuntimeError):
    """The run itself broke (a non-finite loss, say): says where, and what is still good. Exit code 1."""

    on_every_rank = False


class RankLost(RunFailed):
    """Another rank is gone or stuck. Whoever meets it leaves at once: there is nobody to take leave of."""


class Requeue(RunFailed):
    """The run was told to stop and has saved: the same command with --resume auto goes on. Exit code 75, EX_TEMPFAIL."""
