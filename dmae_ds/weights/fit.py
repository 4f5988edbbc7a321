"""Whether a weights file is surely this teacher's: every needed tensor there, none left over without a known reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.containers import Container
from dmae_ds.weights.formats import FORMATS, Weights, map_names
from dmae_ds.weights.positions import square_side

# Parts of a checkpoint that a truncated encoder has no use for: whatever stands above the blocks.
_DROPPED = re.compile(r"(norm|fc_norm|head|head_dist|attn_pool|decoder_\w+|mask_token)(\.|$)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Changes nothing where it is zero everywhere: DINOv3's distilled models store such biases.
_MAY_BE_ZERO = re.compile(r".*attn\.[qv]_bias$")


@dataclass(frozen=True)
class Dropped:
    """What stays in the file: names under timm's key map, by the part they belong to. Numbers are parameters and bytes."""

    blocks: dict[str, int]
    decoder: dict[str, int]
    rest: dict[str, int]
    num_bytes: int

    @property
    def parameters(self) -> int:
        return sum(sum(part.values()) for part in (self.blocks, self.decoder, self.rest))


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to, counted from 0: "blocks.3.mlp.fc1.weight" -> 3."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def check_fit(needed: dict[str, Tensor], weights: Weights, *, depth: int, may_resize: bool) -> Dropped:
    """needed: {name: tensor of the right shape}, the first `depth` blocks; may_resize: the recipe sets another picture size,
    so position codes may come from another (square) grid.

    Returns what is knowingly left in the file. Raises UserError that lists the first missing, misshapen and unexpected
    names and says what the file looks like.
    """
    problems, parts = _compare(needed, weights, depth, may_resize)
    if any(problems.values()):
        raise UserError(_explain(weights, needed, problems, depth, may_resize))
    left = {key for part in parts.values() for name in part for key in weights.sources[name].names} | set(
        weights.ignored
    )
    num_bytes = sum(weights.container.places[key].num_bytes for key in left)
    return Dropped(**parts, num_bytes=num_bytes)


def fits(needed: dict[str, Tensor], *, depth: int, may_resize: bool) -> Callable[[Weights], bool]:
    """The same as a question."""
    return lambda weights: not any(_compare(needed, weights, depth, may_resize)[0].values())


def _compare(
    needed: dict[str, Tensor], weights: Weights, depth: int, may_resize: bool
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """What is wrong: {"missing" | "misshapen" | "unexpected": names}; and what is left out: {part: {name: entries}}."""
    missing = [name for name in needed if name not in weights]
    misshapen = [
        f"{name} {_shape_of(name, weights)} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in weights and not _same_shape(name, weights, tensor, may_resize)
    ]
    parts: dict[str, dict[str, int]] = {"blocks": {}, "decoder": {}, "rest": {}}
    unexpected = []
    # DINOv2 and DINOv3 have a mask token and no decoder.
    of_decoder = (
        ("decoder_", "mask_token") if any(name.startswith("decoder_") for name in weights) else ("decoder_",)
    )
    for name in weights:
        if name in needed:
            continue
        block = block_of(name)
        if block is not None and block >= depth:
            parts["blocks"][name] = _num_entries(name, weights)
        elif _DROPPED.match(name):
            parts["decoder" if name.startswith(of_decoder) else "rest"][name] = _num_entries(name, weights)
        elif not (_MAY_BE_ZERO.match(name) and not weights[name].any()):
            unexpected.append(name)
    return {"missing": missing, "misshapen": misshapen, "unexpected": unexpected}, parts


def _same_shape(name: str, weights: Weights, tensor: Tensor, may_resize: bool) -> bool:
    try:
        found = weights.like(name)
    except (RuntimeError, IndexError):
        return False  # parts of it don't go together
    if found.shape == tensor.shape:
        return True
    if not (
        name in ("pos_embed", "decoder_pos_embed")
        and may_resize
        and found.ndim == 3
        and found.shape[2] == tensor.shape[2]
    ):
        return False
    return any(square_side(found.shape[1] - prefix) for prefix in (0, 1))


def _shape_of(name: str, weights: Weights) -> str:
    try:
        return str(list(weights.like(name).shape))
    except (RuntimeError, IndexError):
        return " + ".join(
            str(list(weights.container.places[key].shape)) for key in weights.sources[name].names
        )


def _num_entries(name: str, weights: Weights) -> int:
    try:
        return weights.like(name).numel()
    except (RuntimeError, IndexError):
        return sum(weights.container.like(key).numel() for key in weights.sources[name].names)


def _explain(
    weights: Weights, needed: dict[str, Tensor], problems: dict[str, list[str]], depth: int, may_resize: bool
) -> str:
    lists = "; ".join(f"{label} {len(names)}: {_first(names)}" for label, names in problems.items() if names)
    hint = ""
    if weights.container.absent:
        hint = f"; {len(weights.container.absent)} parts are not here: {_first(weights.container.absent)}"
    elif weights.container.metadata.get("last_block", "").isdigit():
        hint = f"; this slice holds blocks 1-{weights.container.metadata['last_block']}: for a deeper tap, slice again with --last-block"
    else:
        kind = describe_kind(weights.container)
        better = _better_format(weights, needed, bool(problems["missing"]), depth, may_resize)
        hint = f"; the file looks like {kind}" if kind else ""
        if better:
            hint += f"{':' if kind else ';'} try teacher.format={better}"
        if any(name.startswith("pos_embed ") for name in problems["misshapen"]) and not may_resize:
            hint += "; for another picture size set teacher.img_size"
    return f"teacher.weights '{weights.path}' does not fit the teacher as format {weights.format}: {lists}{hint}; check teacher.name, teacher.format and the file"


def _better_format(
    weights: Weights, needed: dict[str, Tensor], names_are_missing: bool, depth: int, may_resize: bool
) -> str | None:
    """Another format under which the file fits; else, where names are missing, one that has them all, whatever the shapes."""
    others = []
    for format in FORMATS:
        try:
            others.append(map_names(weights.container, format))
        except UserError:
            continue
    ask = fits(needed, depth=depth, may_resize=may_resize)
    fitting = [other.format for other in others if ask(other)]
    naming = [other.format for other in others if names_are_missing and needed.keys() <= other.keys()]
    return next(iter(fitting + naming), None)


# What published files are called by their names; the first that matches says it. (pattern that some name has, what it is)
_KINDS = (
    (r"^decoder\.decoder_(embed|pred)", "transformers' ViT-MAE with its decoder (format hf)"),
    (
        r"^(\w+\.)?encoder\.layer\.\d+\.attention\.attention\.query",
        "transformers' ViT or DINOv2 encoder (format hf)",
    ),
    (r"^(model\.)?layer\.\d+\.attention\.q_proj", "transformers' DINOv3 (format hf)"),
    (r"^storage_tokens$", "a published DINOv3 (format dinov3)"),
    (r"^register_tokens$|^backbone\.", "a published DINOv2 (format dinov2)"),
    (
        r"^(visual\.)?transformer\.resblocks\.|^visual\.",
        "an OpenAI or OpenCLIP checkpoint; save its image tower under timm's names",
    ),
    (r"^student\.|^decoder\.blocks\.", "a file of ours that holds no teacher; use student.safetensors"),
    (r"^module\.", "a DataParallel state dict; strip `module.` from its names"),
    (r"^decoder_embed\.", "a whole MAE, encoder and decoder (format mae)"),
    (r"^(fc_norm|head)\.", "a classifier (format timm or mae): encoder and head, no decoder"),
    (r"^blocks\.0\.", "an encoder only: has no decoder"),
)


def describe_kind(names: Container | list[str]) -> str:
    """What kind of known file has such names; empty where none does."""
    return next((kind for pattern, kind in _KINDS if any(re.search(pattern, name) for name in names)), "")


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def read_needed(
    needed: list[str], weights: Weights, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Read exactly these tensors, one at a time: the peak is what is kept and one tensor of the file."""
    return {name: weights[name].to(device=device, dtype=dtype) for name in needed}
