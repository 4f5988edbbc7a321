"""RUN/train.log: everything that rank 0 prints about a run, of every start, and what ended it."""

from __future__ import annotations

import shlex
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from dmae_ds import __version__
from dmae_ds.errors import RunFailed, UserError, line_of
from dmae_ds.output.lines import close_log, keep_log, log

LOG = "train.log"


def begin_log(run_dir: Path) -> None:
    """Append all lines from now on, first the command. Call it on rank 0 alone, inside `log_until_end`."""
    keep_log(run_dir / LOG)
    log(f"dmae-ds {__version__}: {shlex.join(sys.argv)}, in {Path.cwd()}")


@contextmanager
def log_until_end() -> Iterator[None]:
    """Close the log behind the block; what ended the block early is the log's last entry."""
    try:
        yield
    except (UserError, RunFailed) as error:
        log(line_of(error))
        raise
    except BaseException:
        log(traceback.format_exc().rstrip())
        raise
    finally:
        close_log()
