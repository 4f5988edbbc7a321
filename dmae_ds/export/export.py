"""`dmae-ds export RUN --to timm|hf|onnx|safetensors|original`: write, load back, compare, describe, rename.

The folder gets its name only after the other library has given the trained network's outputs.
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
from dmae_ds.export import to_hf, to_onnx, to_original, to_timm
from dmae_ds.export.card import make_card
from dmae_ds.export.early import choose_out
from dmae_ds.export.model_card import LIBRARY, write_card
from dmae_ds.export.source import Inputs, Source, open_source
from dmae_ds.output.durable import settle

LIMIT = 1e-5  # the largest difference that an export may have, in float32
# Where float32 itself is coarser: this many times the distance of the trained network from its own float64
# outputs. A ViT-B with random norm gains of 1 to 4 is 4e-5 from those, and timm's copy 6e-5 from it; with
# gains of 1: 4e-6, 5e-6.
ROUNDINGS = 4


@dataclass(frozen=True)
class Target:
    """One layout.

    parts: what it can hold, the default first
    needs: packages besides the project's own dependencies
    write: fills a folder
    run: returns the other library's outputs for some inputs, from the folder alone
    explain: returns Python that loads the folder
    """

    parts: tuple[str, ...]
    needs: tuple[str, ...]
    write: Callable[[Source, Path], None]
    run: Callable[[Source, Path, Inputs], dict[str, Tensor]]
    explain: Callable[[Source, str], str]


TARGETS = {
    "timm": Target(("encoder", "classifier"), (), to_timm.write_timm, to_timm.run_timm, to_timm.explain_timm),
    "hf": Target(
        ("encoder", "mae", "classifier"), ("transformers",), to_hf.write_hf, to_hf.run_hf, to_hf.explain_hf
    ),
    "onnx": Target(
        ("encoder", "classifier", "segmenter"),
        ("onnx", "onnxscript", "onnxruntime"),
        to_onnx.write_onnx,
        to_onnx.run_onnx,
        to_onnx.explain_onnx,
    ),
    "safetensors": Target(
        ("encoder", "classifier"),
        (),
        to_timm.write_safetensors,
        to_timm.run_safetensors,
        to_timm.explain_safetensors,
    ),
    "original": Target(
        ("encoder",),
        (),
        to_original.write_original,
        to_original.run_original,
        to_original.explain_original,
    ),
}


def export(
    run: Path, *, to: str, what: str = "encoder", out: Path | None = None, license: str = "unknown"
) -> tuple[Path, dict]:
    """Export a part of a run, or an evaluation's classifier or segmenter; return the new folder and its card.

    out: None is RUN/export/<to>, or <to>-mae
    Raises UserError for a part or a library that is missing, RunFailed where an output differs by more than
    LIMIT and by more than rounding explains.
    """
    target = TARGETS[to]
    _check_target(target, to=to, what=what)
    out = choose_out(run, to=to, what=what, out=out)
    source = open_source(run, what)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by an export that was killed
    try:
        temporary.mkdir(parents=True)
        target.write(source, temporary)
        inputs = source.inputs()
        with torch.no_grad():
            differences = compare(target.run(source, temporary, inputs), source.outputs(inputs))
        limits = {
            name: max(LIMIT, ROUNDINGS * rounding) for name, rounding in source.rounding(inputs).items()
        }
        if not all(differences[name] <= limits[name] for name in limits):  # also for NaN
            text = ", ".join(
                f"{name} by {value:.1e} where {limits[name]:.1e} is allowed"
                for name, value in differences.items()
            )
            raise RunFailed(
                f"the {to} export of '{run}' differs from the trained network: {text}; nothing was written"
            )
        card = make_card(source, to=to, differences=differences, limits=limits, license=license)
        write_card(card, target.explain(source, out.name), temporary)
        for path in temporary.iterdir():
            settle(path)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error}); choose another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out, card


def _check_target(target: Target, *, to: str, what: str) -> None:
    """Raise UserError for a part that the layout can't hold, and for packages that are not installed."""
    if what not in target.parts:
        fitting = [name for name, other in TARGETS.items() if what in other.parts]
        raise UserError(
            f"--to {to} can't hold --what {what}; choose --what {' or '.join(target.parts)}, "
            f"or --to {' or '.join(fitting)}"
        )
    missing = [name for name in target.needs if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to {to} requires packages that are not installed: {', '.join(missing)}; "
            "run pip install 'dmae-ds[export]'"
        )


def compare(exported: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest absolute difference of each output; NaN where either is NaN."""
    assert exported.keys() == trained.keys(), (exported.keys(), trained.keys())
    assert all(exported[name].shape == output.shape for name, output in trained.items())
    return {
        name: float((exported[name].double() - output.double()).abs().max())
        for name, output in trained.items()
    }


def describe(out: Path, card: dict) -> str:
    """Return one line about a finished export."""
    differences = ", ".join(f"{name} {value:.1e}" for name, value in card["check"]["differences"].items())
    library = {"onnx": "onnxruntime", "original": "dmae-ds and timm"}.get(card["to"], LIBRARY[card["to"]])
    return f"{out}: step {card['step']:,}, loaded back with {library}, largest difference {differences}"
