"""dmae-ds checkpoint convert: DeepSpeed's universal layout, for use with other programs.

    OUT/step-00000500/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt
    OUT/latest_universal

`--resume auto` needs none of this. Stages 1 to 3 go through DeepSpeed's own converter; it has none for stage 0.
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

from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.errors import UserError
from dmae_ds.output.durable import sync_folder
from dmae_ds.tools.checkpoint_find import find_one
from dmae_ds.train.checkpoint.folder import bytes_in


def convert(path: Path, out: Path) -> str:
    """Write a checkpoint as OUT in the universal layout; says what was written. OUT appears only when it is complete.

    Raises UserError where OUT exists, the checkpoint is broken, or there is no room.
    """
    folder, checkpoint = find_one(path)
    if out.exists():
        raise UserError(f"'{out}' exists; choose another name, or delete it")
    folder.check_bytes(checkpoint)
    state = folder.read_state(checkpoint)
    if state["version"] < 3 and state["zero_stage"] == 0:
        raise UserError(
            f"checkpoint '{checkpoint}' was written by a program that did not note which optimiser state is whose; continue it as it was written, and convert the next one"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = (
        2 * bytes_in(checkpoint),
        shutil.disk_usage(out.parent).free,
    )  # DeepSpeed's converter writes slices first
    if free < needed:
        raise UserError(
            f"converting needs {needed / 2**20:,.0f} MiB in {out.parent}, {free / 2**20:,.0f} are free; make room, or choose another place"
        )
    import_deepspeed(torch.device("cpu"))
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        (_convert_plain if state["zero_stage"] == 0 else _convert_parted)(
            checkpoint, temporary / checkpoint.name
        )
        (temporary / "latest_universal").write_text(checkpoint.name)
        _sync(temporary)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "failed writing" not in str(
            error
        ):  # torch.save's word for a full disk
            raise
        raise UserError(f"'{out}' could not be written: {error}") from None
    finally:
        if not (temporary / "latest_universal").exists():
            shutil.rmtree(temporary, ignore_errors=True)
    os.rename(temporary, out)
    sync_folder(out.parent)
    return f"{out}: step {state['step']} in DeepSpeed's universal layout, {bytes_in(out) / 2**20:,.1f} MiB; written by {state['world_size']} ranks, ZeRO stage {state['zero_stage']}"


def _convert_parted(checkpoint: Path, out: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # One worker each: without processes of its own. What a dense model lacks of its schema it may put in.
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
    """Let torch.load read plain data alone, whatever its callers ask for."""
    from dmae_ds.train.checkpoint.deepspeed_files import allowed_classes

    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _convert_plain(checkpoint: Path, out: Path) -> None:
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
