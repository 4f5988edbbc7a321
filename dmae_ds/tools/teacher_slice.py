"""`dmae-ds teacher slice FILE OUT --stages P`: one safetensors file for each pipeline stage, with its blocks.

    OUT/stage-1-of-2.safetensors       the embedding and this stage's blocks, under timm's names
    OUT/model.safetensors.index.json   which file holds which tensor
    OUT/teacher.json                   the network, the cut and the fingerprint, which every run compares

A recipe reads the folder with teacher.weights=OUT teacher.format=dmae_ds. A rank can load its stage from a
folder that has only this stage's file.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.objectives.feature_distillation import resolve_pairs
from dmae_ds.output.durable import settle, write_tensors
from dmae_ds.output.units import size_text
from dmae_ds.teacher import identity
from dmae_ds.teacher.frozen import DTYPES, meta_teacher
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.tools.early import check_slice
from dmae_ds.tools.teacher_inspect import probe_by_block, write_sidecar
from dmae_ds.tools.teacher_known import Network, identify
from dmae_ds.weights.fit import block_of
from dmae_ds.weights.named import open_weights


def slice_teacher(
    path: Path,
    out: Path,
    *,
    num_stages: int,
    name: str | None = None,
    overrides: list[str] = (),
    format: str = "auto",
    dtype: str | None = None,
    last_block: int | None = None,
) -> str:
    """Cut a teacher, with one stage in memory at a time; returns a line about what was written.

    last_block: the deepest tapped block; None: three quarters of the depth (DMAE, Sec. 4.1)
    dtype: None keeps the file's
    Raises UserError; then nothing is left under OUT.
    """
    path, out = path.expanduser(), out.expanduser()
    check_slice(path, out, num_stages=num_stages, last_block=last_block)
    network = identify(path, name=name, overrides=list(overrides), format=format)
    whole_blocks = meta_teacher(network.name, network.overrides).depth
    if last_block is None:
        ((_, last_block),) = resolve_pairs(None, student_depth=1, teacher_depth=whole_blocks)
    if not 1 <= last_block <= network.vit.depth:
        raise UserError(
            f"--last-block {last_block} is not one of the {network.vit.depth} blocks of '{path}'; "
            f"give 1 to {network.vit.depth}"
        )
    cut = replace(network, vit=meta_teacher(network.name, network.overrides, last_block))
    stages = held_blocks(last_block, num_stages)
    unfinished = out.with_name(out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        num_bytes = _write_stages(cut, stages, unfinished, dtype)
        # The fingerprint is that of the stored tensors, in their dtype.
        stored = replace(cut, weights=open_weights(unfinished, "dmae_ds"))
        fingerprint = identity.fingerprint(probe_by_block(stored).features)
        write_sidecar(
            unfinished / "teacher.json",
            cut,
            fingerprint,
            blocks=last_block,
            whole_blocks=whole_blocks,
            stages=[[stage.start + 1, stage.stop] for stage in stages],
            source=path.name,
            source_format=network.weights.format,
        )
        os.replace(unfinished, out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written ({error}); choose another OUT") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    blocks = f"blocks 1-{last_block} of {whole_blocks} in {num_stages} stages"
    use = f"use teacher.weights={out} teacher.format=dmae_ds"
    return f"{out}: {network.name}, {blocks}, {size_text(num_bytes)}; {use}"


def _write_stages(cut: Network, stages: list[range], folder: Path, dtype: str | None) -> int:
    """Write a file for each stage, and the index; returns the number of bytes of all tensors."""
    names = list(cut.vit.state_dict())
    weight_map: dict[str, str] = {}
    num_bytes = 0
    metadata = {
        "format": "pt",
        "timm_name": cut.name,
        "timm_overrides": json.dumps(cut.overrides),
        "last_block": str(stages[-1].stop),
    }
    for number, stage in enumerate(stages, start=1):
        file = f"stage-{number}-of-{len(stages)}.safetensors"
        of_stage = [name for name in names if block_of(name) is None or block_of(name) in stage]
        tensors = {name: cut.weights[name] for name in of_stage}
        if dtype:
            tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_tensors(folder / file, contiguous, metadata)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        for name in of_stage:
            weight_map.setdefault(name, file)
        del tensors, contiguous
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    for file in folder.iterdir():
        settle(file)
    return num_bytes
