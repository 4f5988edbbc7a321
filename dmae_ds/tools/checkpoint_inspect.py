"""`dmae-ds checkpoint inspect | verify`: a table of checkpoints, and what is wrong with them (no torch)."""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table
from dmae_ds.output.units import MIB
from dmae_ds.tools.checkpoint_find import find
from dmae_ds.train.checkpoint.folder import bytes_in, parse_state, what_is_wrong

HEADINGS = ("checkpoint", "step", "position", "epoch", "ranks", "ZeRO", "precision", "MiB", "save s", "state")


def inspect(path: Path) -> str:
    """List checkpoints in a table, without reading their files. Raises UserError where there are none."""
    folder, checkpoints = find(path)
    pointer = folder.path / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else None
    rows = [HEADINGS, *(_row(checkpoint, latest) for checkpoint in checkpoints)]
    lines = text_table(rows, left=(0, 6, 9))
    names = {checkpoint.name for checkpoint in checkpoints}
    if latest is not None and len(checkpoints) > 1 and latest not in names:
        lines.append(f"`latest` names {latest}, which was not found")
    return "\n".join([str(folder.path), *lines])


def _row(checkpoint: Path, latest: str | None) -> tuple[str, ...]:
    state, problems = judge(checkpoint, read=False)
    epoch = f"{state['position'] / state['num_samples']:.2f}" if "num_samples" in state else "?"
    mark = ", latest" if checkpoint.name == latest else ""
    return (
        checkpoint.name,
        _cell(state.get("step", "?")),
        _cell(state.get("position", "?")),
        epoch,
        _cell(state.get("world_size", "?")),
        _cell(state.get("zero_stage", "?")),
        _cell(state.get("precision", "?")),
        f"{bytes_in(checkpoint) / MIB:,.1f}",
        str(state.get("seconds", "?")),
        ("; ".join(problems) or "sizes right") + mark,
    )


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def verify(path: Path) -> str:
    """Read every file of the checkpoints and compare the checksums; returns a line for each checkpoint.

    Raises UserError with everything that is wrong.
    """
    _, checkpoints = find(path)
    broken, lines = [], []
    for checkpoint in checkpoints:
        state, problems = judge(checkpoint, read=True)
        broken += [f"{checkpoint.name}: {problem}" for problem in problems]
        if not problems:
            files = state["files"].values()
            line = f"{checkpoint.name}: complete, {len(files)} files"
            line += f", {sum(file.bytes for file in files) / MIB:,.1f} MiB"
            if any(file.crc32 is None for file in files):
                line += "; only the sizes were compared, because it has no checksums"
            lines.append(line)
    if broken:
        raise UserError("; ".join([*broken, *lines]))
    return "\n".join(lines)


def judge(checkpoint: Path, *, read: bool) -> tuple[dict, list[str]]:
    """Return the content of state.json, or {}, and everything that is wrong with a checkpoint."""
    try:
        state = parse_state(checkpoint)
    except FileNotFoundError:
        return {}, ["not a checkpoint: state.json is missing, because the save was interrupted"]
    except (OSError, json.JSONDecodeError, UserError) as error:
        return {}, [f"state.json cannot be read: {error}"]
    checked = (what_is_wrong(checkpoint / name, file, read=read) for name, file in state["files"].items())
    return state, [problem for problem in checked if problem is not None]
