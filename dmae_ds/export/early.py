"""Mistakes in an export that are found before torch is imported, in a fraction of a second."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.new_path import refuse_existing


def choose_out(run: Path, *, to: str, what: str, out: Path | None) -> Path:
    """The folder to write: `out`, or RUN/export/<to>, or <to>-mae. Raises UserError where it exists."""
    if not run.is_dir():
        raise UserError(f"'{run}' is not a folder; name a run folder, or what eval finetune or linear wrote")
    out = out or run / "export" / (f"{to}-mae" if what == "mae" else to)
    existing = refuse_existing(out, name="--out", reads=run)
    if existing:
        raise UserError(existing)
    return out
