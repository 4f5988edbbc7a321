"""`dmae-ds checkpoint convert`: DeepSpeed's universal format, for other programs.

    OUT/step-00000500/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt
    OUT/latest_universal

Of a family OUT/<name> is that for each student, and RUN/<name> is converted alone.
`--resume auto` does not need it. Stages 1 to 3 are converted by DeepSpeed's own program, which does not take
stage 0.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Iterator

import torch

from dmae_ds.config.load import family_of
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.errors import UserError
from dmae_ds.output.durable import sync_folder
from dmae_ds.output.units import MIB
from dmae_ds.tools.checkpoint_find import find_to_convert
from dmae_ds.train.checkpoint.folder import bytes_in


def convert(path: Path, out: Path) -> str:
    """Write a checkpoint as OUT in the universal format; returns a line about it.

    OUT appears when it is complete.
    Raises UserError where OUT exists, the checkpoint is damaged, or the disk is full.
    """
    folder, checkpoint = find_to_convert(path, out)
    folder.check_bytes(checkpoint)
    state = folder.read_state(checkpoint)
    stage = state["zero_stage"]
    if state["version"] < 3 and stage == 0:
        raise UserError(
            f"checkpoint '{checkpoint}' is of an early version, which did not store the names of optimiser "
            "states; continue the run with the same ranks and ZeRO stage, and convert its next checkpoint"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error}); choose another OUT") from None
    _check_space(checkpoint, out.parent)
    import_deepspeed(torch.device("cpu"))
    convert_stage = _convert_unsharded if stage == 0 else _convert_sharded
    students = list(state.get("students") or [""])
    alone = path.resolve().name if family_of(path) is not None else ""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for name in [alone] if alone else students:
            folder = temporary if alone else temporary / name
            folder.mkdir(exist_ok=True)
            convert_stage(checkpoint / name, folder / checkpoint.name)
            (folder / "latest_universal").write_text(checkpoint.name)
        _sync(temporary)
        os.rename(temporary, out)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError with these words for a full disk.
        if isinstance(error, RuntimeError) and "failed writing" not in str(error):
            raise
        raise UserError(f"'{out}' could not be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(out.parent)
    size = f"{bytes_in(out) / MIB:,.1f} MiB"
    origin = f"written by {state['world_size']} ranks, ZeRO stage {stage}"
    return f"{out}: step {state['step']} in DeepSpeed's universal format, {size}; {origin}"


def _check_space(checkpoint: Path, folder: Path) -> None:
    """Raise UserError unless twice the checkpoint's bytes are free: DeepSpeed writes slices first."""
    needed = 2 * bytes_in(checkpoint)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / MIB:,.0f} MiB free, converting needs {needed / MIB:,.0f} MiB; "
            "free space, or choose another folder"
        )


def _convert_sharded(checkpoint: Path, out: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # One worker each: it starts no processes. It may add what a dense model lacks of its schema.
    options = Namespace(
        input_folder=str(checkpoint),
        output_folder=str(out),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        _unpickling_nothing(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        ds_to_universal.main(options)


@contextlib.contextmanager
def _unpickling_nothing() -> Iterator[None]:
    """Make torch.load read plain data only, whatever its callers ask for."""
    from dmae_ds.train.checkpoint.deepspeed_files import allowed_classes

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _convert_unsharded(checkpoint: Path, out: Path) -> None:
    from deepspeed.checkpoint.constants import DS_VERSION, PARAM, PARAM_GROUPS

    from dmae_ds.train.checkpoint.deepspeed_files import load_file
    from dmae_ds.train.checkpoint.full_state import FullState

    state = FullState(checkpoint, stage=0)
    for name in state.names:
        folder = out / "zero" / name
        folder.mkdir(parents=True)
        for key, value in state.read(name).items():
            torch.save({PARAM: value}, folder / f"{key}.pt")
        torch.save(torch.tensor(state.step), folder / "step.pt")
    (model,) = checkpoint.glob("*_model_states.pt")
    file = load_file(model)
    torch.save(
        {DS_VERSION: file[DS_VERSION], PARAM_GROUPS: file["optimizer"][PARAM_GROUPS]},
        out / "zero" / "optimizer_state.pt",
    )
    shutil.copy2(model, out)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
