"""`dmae-ds teacher inspect FILE`: its network, its parts, the recipes that it fits, and its fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator

import torch
from torch import nn

from dmae_ds import __version__
from dmae_ds.config.load import load_config
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.shipped import shipped_files
from dmae_ds.config.teachers import taps_of
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT, build_timm_vit
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.feature_distillation import resolve_pairs
from dmae_ds.output.durable import write_atomically
from dmae_ds.output.units import size_text
from dmae_ds.teacher import identity
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import meta_teacher, needed_depths, needs_top
from dmae_ds.teacher.output import TeacherOutput, meta_output, output_taps
from dmae_ds.teacher.relation import why_no_relation
from dmae_ds.tools.teacher_known import Network, dtype_of, identify
from dmae_ds.weights.fit import Dropped, block_of, check_fit, fits
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
    """Describe a weights file; `write` stores its fingerprint next to it.

    Raises UserError where no network fits.
    """
    path = path.expanduser()
    network = identify(path, name=name, overrides=list(overrides), format=format)
    vit, weights = network.vit, network.weights
    dropped = check_fit(
        vit.state_dict(), weights, depth=vit.depth, may_resize="img_size" in network.overrides
    )
    probed = probe_by_block(network)
    fingerprint = identity.fingerprint(probed.features)
    recipes = ", ".join(serving_recipes(path, network))
    rows = {
        "file": _describe_file(weights),
        "format": _describe_format(weights),
        "content": weights.container.note,
        "kind": describe_kind(weights.container),
        "network": _describe_network(network),
        "fits too": ", ".join(network.others),
        "parts": _describe_parts(vit, dropped),
        "needed": _describe_needed(network),
        "taps": ", ".join(served_taps(network)),
        "recipes": recipes or "none of the shipped ones; set teacher.name and its numbers in your own",
        "features": _describe_features(vit, probed),
        "fingerprint": _compare_or_write(path, network, fingerprint, write=write),
    }
    return "\n".join(f"{label:<12}{text}" for label, text in rows.items() if text)


def probe_by_block(network: Network) -> identity.Probe:
    """Compute the features of the fixed input in float32, with one block in memory at a time."""
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


def write_sidecar(file: Path, network: Network, fingerprint: identity.Fingerprint, **more: object) -> None:
    """Write the file next to the weights with which every run compares its teacher."""
    content = {
        "version": SIDECAR_VERSION,
        "dmae_ds": __version__,
        "name": network.name,
        "overrides": network.overrides,
        "fingerprint": fingerprint,
        **more,
    }
    write_atomically(file, json.dumps(content, indent=1).encode())


def serving_recipes(path: Path, network: Network) -> list[str]:
    """Names of shipped recipes whose teacher this file is, apart from teacher.weights and teacher.format."""
    names = []
    for file in sorted(shipped_files("recipe").values()):
        config = load_config(str(file))
        named = {
            name: teacher
            for name, teacher in config.named_teachers().items()
            if network.name.split(".")[0] == teacher.name
        }
        if not named:
            continue
        objective, shapes = build_objective(config, device="meta")
        for name, teacher in named.items():
            if _serves(network, teacher, taps_of(name, objective.taps), shapes[name].depth):
                names.append(f"{file.stem} ({teacher.key('format')}={network.weights.format})")
    return names


def _serves(network: Network, teacher: TeacherConfig, taps: tuple[str, ...], whole_blocks: int) -> bool:
    """Whether a file holds what a recipe's teacher needs for these taps."""
    cut, decoder_depth = needed_depths(taps, whole_blocks, teacher.decoder_depth)
    needed = meta_teacher(teacher.name, teacher.overrides(), cut).state_dict()
    above_encoder = []
    if decoder_depth:
        above_encoder = ["decoder_embed.weight"]
    elif "logits" in taps:
        above_encoder = ["head.weight"]
    elif needs_top(taps):
        above_encoder = meta_output(teacher.name, teacher.overrides(), taps=taps).state_dict()
    return all(key in network.weights for key in above_encoder) and fits(
        needed, network.weights, depth=cut, may_resize=teacher.img_size is not None
    )


def served_taps(network: Network) -> list[str]:
    """The taps that an objective may ask of this file: "block/1 to block/12", "tokens", ..."""
    blocks, weights = network.vit.blocks, network.weights
    whole = build_timm_vit(network.name, network.overrides, where="teacher")
    taps = [f"block/1 to block/{len(blocks)}"]
    if not why_no_relation(blocks[0]):
        taps.append(f"relation/1 to relation/{len(blocks)}")
    if len(blocks) < len(whole.blocks):
        return taps  # a slice ends below the output
    for tap in output_taps(whole):
        if all(name in weights for name in TeacherOutput(whole, taps=(tap,)).state_dict()):
            taps.append(tap)
    if "decoder_embed.weight" in weights:
        depth = len({name.split(".")[1] for name in weights if name.startswith("decoder_blocks.")})
        taps += [f"decoder/1 to decoder/{depth}", "prediction"]
    return [*taps, "logits"] if "head.weight" in weights else taps


def _compare_or_write(path: Path, network: Network, found: identity.Fingerprint, *, write: bool) -> str:
    file = identity.sidecar(path)
    last = f"block/{max(int(tap.split('/')[1]) for tap in found)}"
    text = f"{last} {' '.join(f'{figure:.4g}' for figure in found[last][:4])} ..."
    if write:
        if _is_of_slices(file):
            raise UserError(
                f"'{file}' was written by dmae-ds teacher slice and is not overwritten; slice again"
            )
        try:
            write_sidecar(file, network, found)
        except OSError as error:
            raise UserError(
                f"'{file}' cannot be written ({error}); copy the weights elsewhere, or leave --write out"
            ) from None
        return f"{text}; written to {file}"
    known = identity.read_sidecar(path)
    if known is None:
        return f"{text}; --write stores it next to the file, for every run to compare with"
    identity.check_fingerprint(found, known["fingerprint"], dtype=torch.float32, where=str(file))
    return f"{text}; matches {file}"


def _is_of_slices(sidecar: Path) -> bool:
    try:
        return "stages" in json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _describe_file(weights: Weights) -> str:
    num_bytes = sum(place.num_bytes for place in weights.container.places.values())
    size = f"{size_text(num_bytes)}, {len(weights.container)} tensors"
    return f"{weights.path}, {size}, {dtype_of(weights)}"


def _describe_format(weights: Weights) -> str:
    meaning = FORMATS[weights.format].about if weights.format in FORMATS else "your own"
    return f"{weights.format}: {meaning}"


def _describe_network(network: Network) -> str:
    vit = network.vit
    name = network.name
    if network.overrides:
        name += " with " + ", ".join(f"{key}={value:g}" for key, value in network.overrides.items())
    tokens = [
        f"{vit.grid[0]}x{vit.grid[1]} patches of {vit.patch_size} px",
        "rotary positions" if vit.rope is not None else "positional embedding",
        "CLS" if vit.cls_token is not None else "no CLS",
    ]
    num_registers = vit.num_prefix - (vit.cls_token is not None)
    if num_registers:
        tokens.append(f"{num_registers} registers")
    return f"{name}: width {vit.embed_dim}, {vit.depth} blocks, {', '.join(tokens)}"


def _describe_parts(vit: MaskedViT, dropped: Dropped) -> str:
    in_blocks, in_embedding = 0, 0
    for key, tensor in vit.state_dict().items():
        if block_of(key) is None:
            in_embedding += tensor.numel()
        else:
            in_blocks += tensor.numel()
    counts = {"blocks": in_blocks, "embedding": in_embedding}
    groups = {"decoder": dropped.decoder} if dropped.decoder else {}
    for name, count in dropped.rest.items():
        groups.setdefault(name.split(".")[0], {})[name] = count
    counts |= {label: sum(group.values()) for label, group in groups.items()}
    return ", ".join(f"{label} {_millions(count)}" for label, count in counts.items())


def _describe_needed(network: Network) -> str:
    """The blocks that DMAE's default tap needs: three quarters of the whole network's depth."""
    vit = network.vit
    whole_depth = meta_teacher(network.name, network.overrides).depth
    ((_, cut),) = resolve_pairs(None, student_depth=1, teacher_depth=whole_depth)
    needed = [key for key in vit.state_dict() if block_of(key) is None or block_of(key) < cut]
    size = size_text(network.weights.num_bytes(needed))
    return f"{min(cut, vit.depth)} blocks (three quarters of the depth): {size} of the file are read"


def _describe_features(vit: nn.Module, probed: identity.Probe) -> str:
    deepest = max(probed.features)
    identity.check_alive({f"block/{deepest}": probed.features[deepest]})
    untrained = identity.find_untrained(vit, probed)
    if untrained:
        return f"WARNING: THIS TEACHER LOOKS UNTRAINED: {untrained}"
    return "finite, different for every patch, unlike a freshly initialised network's"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
