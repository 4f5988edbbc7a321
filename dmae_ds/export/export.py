"""`dmae-ds export RUN --to timm|hf|onnx|safetensors`: write, load back by the other library, compare, describe, rename.

The folder appears under its name only when the other library has given the trained network's answers.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.export import to_hf, to_onnx, to_timm
from dmae_ds.export.card import make_card, write_card
from dmae_ds.export.source import Inputs, Source, open_source
from dmae_ds.output.durable import settle

LIMIT = 1e-5  # the largest difference that an export may have, in float32
# Where float32 itself is coarser: this many times the trained network's own distance from its float64 answers. A ViT-B
# with norm gains of 1 to 4 (random) is 4e-5 from those, and timm's copy of it 6e-5 from it; gains of 1: 4e-6 and 5e-6.
ROUNDINGS = 4


@dataclass(frozen=True)
class Target:
    """One layout. parts: what it can hold, the default first; needs: packages beyond this project's own; write, ask and
    explain: fill a folder, the other library's answers to some inputs, Python that loads it."""

    parts: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Source, Path], None]
    ask: Callable[[Source, Path, Inputs], dict[str, Tensor]]
    explain: Callable[[Source, str], str]


TARGETS = {
    "timm": Target(("encoder", "classifier"), (), to_timm.write_timm, to_timm.ask_timm, to_timm.explain_timm),
    "hf": Target(
        ("encoder", "mae", "classifier"), ("transformers",), to_hf.write_hf, to_hf.ask_hf, to_hf.explain_hf
    ),
    "onnx": Target(
        ("encoder", "classifier"),
        ("onnx", "onnxscript", "onnxruntime"),
        to_onnx.write_onnx,
        to_onnx.ask_onnx,
        to_onnx.explain_onnx,
    ),
    "safetensors": Target(
        ("encoder", "classifier"),
        (),
        to_timm.write_safetensors,
        to_timm.ask_safetensors,
        to_timm.explain_safetensors,
    ),
}


def export(
    run: Path, *, to: str, what: str = "encoder", out: Path | None = None, license: str = "unknown"
) -> tuple[Path, dict]:
    """Export a part of a run, or the classifier of an evaluation's folder; returns the folder (default RUN/export/<to>, or <to>-mae) and its card.

    Raises UserError for a part or a library that is not there, RunFailed where the answers differ by more than LIMIT and more than rounding explains.
    """
    target = TARGETS[to]
    if what not in target.parts:
        fitting = [name for name, other in TARGETS.items() if what in other.parts]
        raise UserError(
            f"--to {to} holds no {what}; choose --what {' or '.join(target.parts)}, or --to {' or '.join(fitting)}"
        )
    missing = [name for name in target.needs if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {to} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; pip install 'dmae-ds[export]'"
        )
    out = out or run / "export" / (f"{to}-mae" if what == "mae" else to)
    if out.exists():
        raise UserError(f"'{out}' exists already; delete it, or choose another --out")
    source = open_source(run, what)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        target.write(source, temporary)
        inputs = source.inputs()
        with torch.no_grad():
            differences = compare(target.ask(source, temporary, inputs), source.answers(inputs))
        limits = {
            name: max(LIMIT, ROUNDINGS * rounding) for name, rounding in source.rounding(inputs).items()
        }
        if not all(differences[name] <= limits[name] for name in limits):  # NaN is not
            found = ", ".join(
                f"{name} by {value:.1e} where {limits[name]:.1e} is allowed"
                for name, value in differences.items()
            )
            raise RunFailed(
                f"the {to} export of '{run}' answers differently from the trained network: {found}; nothing was written"
            )
        card = make_card(source, to=to, differences=differences, limits=limits, license=license)
        write_card(card, target.explain(source, out.name), temporary)
        for path in temporary.iterdir():
            settle(path)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out, card


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest absolute difference of each output; NaN where either is."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    assert all(found[name].shape == right.shape for name, right in expected.items())
    return {
        name: float((found[name].double() - right.double()).abs().max()) for name, right in expected.items()
    }


def describe(out: Path, card: dict) -> str:
    """One line for whoever typed the command."""
    differences = ", ".join(f"{name} {value:.1e}" for name, value in card["check"]["differences"].items())
    return f"{out}: step {card['step']:,}, loaded back by {'transformers' if card['to'] == 'hf' else 'onnxruntime' if card['to'] == 'onnx' else 'timm'}, largest difference {differences}"
