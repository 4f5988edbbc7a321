"""`dmae-ds teacher inspect FILE`: what it is, what is in it, which recipes it can serve, and its fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from dmae_ds import __version__
from dmae_ds.config.load import load_config
from dmae_ds.config.shipped import shipped_files
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.feature_distillation import resolve_pairs
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.units import size_text
from dmae_ds.teacher import identity
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import meta_teacher, needed_depths, needs_top
from dmae_ds.tools.teacher_known import Network, dtype_of, identify
from dmae_ds.weights.fit import block_of, check_fit, fits
from dmae_ds.weights.formats import FORMATS
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import Weights

SIDECAR_VERSION = 1


def inspect(
    path: Path,
    *,
    name: str | None = None,
    overrides: list[str] = (),
    format: str = "auto",
    write: bool = False,
) -> str:
    """A page about a weights file; `write` stores its fingerprint beside it. Raises UserError where no network fits."""
    network = identify(path.expanduser(), name=name, overrides=list(overrides), format=format)
    vit, weights = network.vit, network.weights
    dropped = check_fit(
        vit.state_dict(), weights, depth=vit.depth, may_resize="img_size" in network.overrides
    )
    blocks = {key: tensor for key, tensor in vit.state_dict().items() if block_of(key) is not None}
    (cut,) = {
        teacher
        for _, teacher in resolve_pairs(
            None, student_depth=1, teacher_depth=meta_teacher(network.name, network.overrides).depth
        )
    }
    needed = [key for key in vit.state_dict() if block_of(key) is None or block_of(key) < cut]
    numbers = ", ".join(f"{key}={value:g}" for key, value in network.overrides.items())
    probed = probe_by_block(network)
    found = identity.fingerprint(probed.features)
    rows = {
        "file": f"{weights.path}, {size_text(sum(place.num_bytes for place in weights.container.places.values()))}, {len(weights.container)} tensors, {dtype_of(weights)}",
        "format": f"{weights.format}: {FORMATS[weights.format].about if weights.format in FORMATS else 'your own'}",
        "kind": describe_kind(weights.container),
        "network": f"{network.name}{f' with {numbers}' if numbers else ''}: width {vit.embed_dim}, {vit.depth} blocks, {_describe_tokens(network)}",
        "fits too": ", ".join(network.others),
        "parts": ", ".join(
            [
                f"blocks {_millions(sum(tensor.numel() for tensor in blocks.values()))}",
                f"embedding {_millions(sum(tensor.numel() for key, tensor in vit.state_dict().items() if key not in blocks))}",
                *(
                    f"{label} {_millions(sum(part.values()))}"
                    for label, part in _group(dropped.decoder, dropped.rest).items()
                ),
            ]
        ),
        "needed": f"{min(cut, vit.depth)} blocks (three quarters of the depth): {size_text(weights.num_bytes(needed))} are read of it",
        "recipes": ", ".join(serving_recipes(path.expanduser(), network))
        or "none of the shipped ones; set teacher.name and its numbers in your own",
        "features": _look(vit, probed),
        "fingerprint": _compare_or_write(path.expanduser(), network, found, write=write),
    }
    return "\n".join(f"{label:<12}{text}" for label, text in rows.items() if text)


def probe_by_block(network: Network) -> identity.Probe:
    """The fixed input's features with one block in memory at a time, in float32."""
    vit, cpu = network.vit, torch.device("cpu")
    resize = "img_size" in network.overrides
    fill(
        vit,
        network.weights,
        whole_blocks=vit.depth,
        may_resize=resize,
        dtype=torch.float32,
        device=cpu,
        blocks=range(0),
    )
    return identity.probe(vit, _one_by_one(vit, network.weights))


def _one_by_one(vit: MaskedViT, weights: Weights) -> Iterator[nn.Module]:
    for number, block in enumerate(vit.blocks):
        prefix = f"blocks.{number}."
        block.load_state_dict(
            {key: weights[prefix + key].float() for key in block.state_dict()}, strict=True, assign=True
        )
        yield block.eval()
        block.to("meta")


def write_sidecar(file: Path, network: Network, found: identity.Fingerprint, **more: object) -> None:
    """What every run is to compare its teacher with, beside the weights."""
    known = {
        "version": SIDECAR_VERSION,
        "dmae_ds": __version__,
        "name": network.name,
        "overrides": network.overrides,
        "fingerprint": found,
        **more,
    }
    write_atomically(file, json.dumps(known, indent=1).encode())


def serving_recipes(path: Path, network: Network) -> list[str]:
    """Shipped recipes whose teacher this file can be, as they stand but for teacher.weights and teacher.format."""
    names = []
    for file in sorted(shipped_files("recipe").values()):
        config = load_config(str(file))
        if config.teacher is None or network.name.split(".")[0] != config.teacher.name:
            continue
        objective, shape = build_objective(config, device="meta")
        cut, decoder_depth = needed_depths(objective.taps, shape.depth, config.teacher.decoder_depth)
        needed = meta_teacher(config.teacher.name, config.teacher.overrides(), cut).state_dict()
        top = (
            "decoder_embed.weight" if decoder_depth else "head.weight" if needs_top(objective.taps) else None
        )
        if (top is None or top in network.weights) and fits(
            needed, network.weights, depth=cut, may_resize=config.teacher.img_size is not None
        ):
            names.append(f"{file.stem} (teacher.format={network.weights.format})")
    return names


def _compare_or_write(path: Path, network: Network, found: identity.Fingerprint, *, write: bool) -> str:
    file = identity.sidecar(path)
    last = f"block/{max(int(tap.split('/')[1]) for tap in found)}"
    text = f"{last} {' '.join(f'{figure:.4g}' for figure in found[last][:4])} ..."
    if write:
        if path.is_dir() and file.exists():
            raise UserError(
                f"'{file}' was written by dmae-ds teacher slice and is not overwritten; slice again"
            )
        write_sidecar(file, network, found)
        return f"{text}; written to {file}"
    known = identity.read_sidecar(path)
    if known is None:
        return f"{text}; --write stores it beside the file, for every run to compare with"
    identity.check_fingerprint(found, known["fingerprint"], dtype=torch.float32, where=str(file))
    return f"{text}; matches {file}"


def _look(vit: nn.Module, probed: identity.Probe) -> str:
    deepest = max(probed.features)
    identity.check_alive({f"block/{deepest}": probed.features[deepest]})
    untrained = identity.find_untrained(vit, probed)
    return (
        f"WARNING: THIS TEACHER LOOKS UNTRAINED: {untrained}"
        if untrained
        else "finite, different for every patch, unlike a freshly initialised network's"
    )


def _describe_tokens(network: Network) -> str:
    vit = network.vit
    registers = vit.num_prefix - (vit.cls_token is not None)
    positions = "rotary positions" if vit.rope is not None else "position codes"
    return (
        f"{vit.grid[0]}x{vit.grid[1]} patches of {vit.patch_size} px, {positions}, {'CLS' if vit.cls_token is not None else 'no CLS'}"
        f"{f', {registers} registers' if registers else ''}"
    )


def _group(decoder: dict[str, int], rest: dict[str, int]) -> dict[str, dict[str, int]]:
    groups = {"decoder": decoder} if decoder else {}
    for name, count in rest.items():
        groups.setdefault(name.split(".")[0], {})[name] = count
    return groups


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
