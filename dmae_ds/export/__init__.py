"""Exports of a student: written in another library's layout, loaded back with it, compared, described.

`dmae_ds.export(run)` exports in Python, as `dmae-ds export` does.
"""

from __future__ import annotations

from pathlib import Path

from dmae_ds.output.callable_room import make_callable


def export_student(
    run: str | Path,
    *,
    to: str = "timm",
    what: str = "encoder",
    out: str | Path | None = None,
    license: str = "unknown",
) -> Path:
    """Write a run's student in another library's layout, compare it there, and return the new folder.

    run: a run folder, or the folder of `dmae-ds eval finetune`, `linear` or `segment`
    to: timm, hf (transformers), onnx, safetensors, or original (the names of the file in student.weights)
    what: encoder, mae (with its pixel decoder, for hf), classifier or segmenter (for onnx)
    out: the folder to write; None: RUN/export/<to>
    license: of the weights, for the model card
    Raises UserError for a missing run, part or library, RunFailed where the outputs differ.
    """
    from dmae_ds.errors import UserError
    from dmae_ds.export.early import choose_out
    from dmae_ds.export.export import TARGETS, export

    if to not in TARGETS:
        raise UserError(f"to '{to}' is unknown; choose {', '.join(TARGETS)}")
    out = choose_out(Path(run), to=to, what=what, out=None if out is None else Path(out))
    return export(Path(run), to=to, what=what, out=out, license=license)[0]


make_callable(export_student)
