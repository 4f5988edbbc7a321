"""Trackers of a run, by accelerate's classes: TensorBoard under the run folder, and Weights & Biases (W&B).

A run is one run of W&B, however often it is started: its id is in RUN/wandb_id. It has the run folder's name
and the recipe as its config.
"""

from __future__ import annotations

import os
import uuid
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from dmae_ds.config.run import LogConfig, RunConfig
from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_atomically

PROJECT = "dmae-ds"  # W&B's, where neither the recipe nor WANDB_PROJECT names one
ID_FILE = "wandb_id"


def check_trackers(log: LogConfig) -> None:
    """Raise UserError where a tracker that the recipe names is not installed (no torch)."""
    if "wandb" in log.trackers and find_spec("wandb") is None:
        raise UserError(
            "log.trackers has wandb, which is not installed here; "
            "run pip install 'dmae-ds[wandb]', or set log.trackers=[tensorboard]"
        )


def project_of(log: LogConfig) -> str:
    """W&B's project: the recipe's, otherwise WANDB_PROJECT's, otherwise PROJECT."""
    return log.project or os.environ.get("WANDB_PROJECT") or PROJECT


def is_logged_in() -> bool:
    """Whether W&B needs no login: a key is known to it, or it keeps the run on this machine."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def build_trackers(config: RunConfig, run_dir: Path, *, step: int) -> list:
    """Build the recipe's trackers; call it on rank 0 alone, after `step` finished steps of the run.

    Raises UserError with what a service said where it cannot be started.
    """
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    trackers = []
    for name in config.log.trackers:
        if name == "wandb":
            trackers.append(_start_wandb(LOGGER_TYPE_TO_CLASS[name], config, run_dir, step=step))
            continue
        tracker = LOGGER_TYPE_TO_CLASS[name](run_dir.name, logging_dir=run_dir / name)
        tracker.start()
        trackers.append(tracker)
    return trackers


def _start_wandb(tracker_class: type, config: RunConfig, run_dir: Path, *, step: int):
    """Start or continue the run's run of W&B. A run that begins at step 0 is a new one."""
    path = run_dir / ID_FILE
    if step == 0 or not path.exists():
        write_atomically(path, uuid.uuid4().hex[:16].encode())
    name = run_dir.resolve().name
    run_id = path.read_text().strip()
    tracker = tracker_class(project_of(config.log), name=name, id=run_id, resume="allow", dir=str(run_dir))
    try:
        tracker.start()
        tracker.store_init_configuration(config.model_dump(mode="json"))
    except Exception as error:  # a library's own classes, for a login, a network or a service
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"log.trackers wandb did not start ({type(error).__name__}: {reason}); run wandb login, "
            "set WANDB_MODE=offline, or set log.trackers=[tensorboard]"
        ) from None
    return tracker
