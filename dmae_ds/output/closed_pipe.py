"""Commands whose output is read by `head`, which stops reading when it has enough."""

from __future__ import annotations

import os
import select
import signal
import sys

EXIT_CODE = 128 + signal.SIGPIPE  # as of a program that the signal ends


def stdout_is_closed() -> bool:
    """Whether the reader of stdout has gone; then what is left to print is dropped without an error."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
