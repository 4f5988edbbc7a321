"""One job at a time in the folder of a training that runs on accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint.run_lock import hold


def claim(out: Path, accelerator: Accelerator) -> IO[str] | None:
    """Make and own a folder: two jobs that write into one would mix their epochs. Collective.

    Returns the lock, to be closed at the end; None on other processes than the main one.
    Raises UserError on every process if another job has it.
    """
    lock, problem = None, None
    if accelerator.is_main_process:
        try:
            lock = hold(out)
        except UserError as error:
            problem = str(error)
    (problem,) = broadcast_object_list([problem])
    if problem is not None:
        raise UserError(problem)
    return lock
