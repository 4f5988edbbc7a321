"""dmae-ds checkpoint inspect | verify: a run's checkpoints in a table, and whether each is what was written (no torch)."""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table
from dmae_ds.tools.checkpoint_find import find
from dmae_ds.train.checkpoint.folder import bytes_in, parse_state, what_is_wrong

HEADS = ("checkpoint", "step", "position", "epoch", "ranks", "ZeRO", "precision", "MiB", "save s", "state")


def inspect(path: Path) -> str:
    """A table of checkpoints: what wrote each, and whether its files are there in the right sizes. Raises UserError."""
    folder, checkpoints = find(path)
    pointer = folder.path / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else None
    rows = [HEADS]
    for checkpoint in checkpoints:
        state, wrong = judge(checkpoint, read=False)
        condition = "; ".join(wrong) or "sizes right"
        epoch = f"{state['position'] / state['num_samples']:.2f}" if "num_samples" in state else "?"
        cells = [state.get(key, "?") for key in ("step", "position", "world_size", "zero_stage", "precision")]
        step, position, ranks, stage, precision = (
            f"{cell:,}" if isinstance(cell, int) else cell for cell in cells
        )
        mark = ", latest" if checkpoint.name == latest else ""
        rows.append(
            (
                checkpoint.name,
                step,
                position,
                epoch,
                ranks,
                stage,
                precision,
                f"{bytes_in(checkpoint) / 2**20:,.1f}",
                str(state.get("seconds", "?")),
                condition + mark,
            )
        )
    lines = text_table(rows, left=(0, 6, 9))
    if (
        latest is not None
        and len(checkpoints) > 1
        and latest not in {checkpoint.name for checkpoint in checkpoints}
    ):
        lines.append(f"`latest` names {latest}, which is not there")
    return "\n".join([str(folder.path), *lines])


def verify(path: Path) -> str:
    """Read every file of the checkpoints that are meant; returns what was found right. Raises UserError with everything that is wrong."""
    _, checkpoints = find(path)
    broken, lines = [], []
    for checkpoint in checkpoints:
        state, wrong = judge(checkpoint, read=True)
        broken += [f"{checkpoint.name}: {what}" for what in wrong]
        if not wrong:
            files = state["files"].values()
            unknown = (
                ", sizes alone: it is older than checksums"
                if any(written.crc32 is None for written in files)
                else ""
            )
            lines.append(
                f"{checkpoint.name}: whole, {len(files)} files, {sum(written.bytes for written in files) / 2**20:,.1f} MiB{unknown}"
            )
    if broken:
        raise UserError("; ".join([*broken, *lines]))
    return "\n".join(lines)


def judge(checkpoint: Path, *, read: bool) -> tuple[dict, list[str]]:
    """(state.json or {}, everything that is wrong with a checkpoint)."""
    try:
        state = parse_state(checkpoint)
    except FileNotFoundError:
        return {}, ["no checkpoint: it has no state.json, so a save was stopped in the middle"]
    except (OSError, json.JSONDecodeError, UserError) as error:
        return {}, [f"state.json can't be read: {error}"]
    found = (what_is_wrong(checkpoint / name, written, read=read) for name, written in state["files"].items())
    return state, [wrong for wrong in found if wrong is not None]
