"""Check that a weights file surely belongs to a network.

Every tensor that the network needs is there in its shape, and none is left over without a known reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.formats import FORMATS
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import Weights, open_weights
from dmae_ds.weights.positions import square_side

# Parts of a checkpoint above the blocks, which a truncated encoder doesn't need.
_DROPPED = re.compile(r"(norm|fc_norm|head|head_dist|attn_pool|decoder_\w+|mask_token)(\.|$)")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# Biases that change nothing where they are zero everywhere: DINOv3's distilled models store such ones.
_MAY_BE_ZERO = re.compile(r".*attn\.[qv]_bias$")
# A tensor's pieces don't go together.
_BAD_PIECES = (RuntimeError, IndexError)


@dataclass(frozen=True)
class Dropped:
    """Tensors that are left in the file, by the part they belong to: {timm's name: number of entries}."""

    blocks: dict[str, int]
    decoder: dict[str, int]
    rest: dict[str, int]
    num_bytes: int

    @property
    def parameters(self) -> int:
        """Number of parameters that are left in the file."""
        return sum(sum(part.values()) for part in (self.blocks, self.decoder, self.rest))


def block_of(name: str) -> int | None:
    """The block that a tensor belongs to, counted from 0: "blocks.3.mlp.fc1.weight" -> 3."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def check_fit(needed: dict[str, Tensor], weights: Weights, *, depth: int, may_resize: bool) -> Dropped:
    """Check that the file has every needed tensor and nothing that is unexplained.

    needed: {name: tensor of the right shape} of a network with `depth` blocks
    may_resize: the recipe sets another image size: positional embeddings may come from another (square) grid
    Returns what is left in the file on purpose. Raises UserError with the first missing, misshapen and
    unexpected names and what the file looks like.
    """
    problems, dropped = _compare(needed, weights, depth, may_resize)
    if any(problems.values()):
        raise UserError(_explain(weights, needed, problems, depth, may_resize))
    left = set(weights.ignored)
    for names in dropped.values():
        left.update(key for name in names for key in weights.sources[name].names)
    num_bytes = sum(weights.container.places[key].num_bytes for key in left)
    return Dropped(**dropped, num_bytes=num_bytes)


def fits(needed: dict[str, Tensor], weights: Weights, *, depth: int, may_resize: bool) -> bool:
    """Whether `check_fit` accepts the file."""
    problems, _ = _compare(needed, weights, depth, may_resize)
    return not any(problems.values())


def _compare(
    needed: dict[str, Tensor], weights: Weights, depth: int, may_resize: bool
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Compare names and shapes.

    Returns {"missing" | "misshapen" | "unreadable" | "unexpected": names}, and what is left out as {part:
    {name: entries}}.
    """
    missing = [name for name in needed if name not in weights]
    misshapen = [
        f"{name} {_shape_of(name, weights)} instead of {list(tensor.shape)}"
        for name, tensor in needed.items()
        if name in weights
        and not _unreadable(name, weights)
        and not _same_shape(name, weights, tensor, may_resize)
    ]
    # A number that was rounded to an integer means nothing without its scale.
    unreadable = [
        f"{name} {why}" for name in needed if name in weights and (why := _unreadable(name, weights))
    ]
    dropped: dict[str, dict[str, int]] = {"blocks": {}, "decoder": {}, "rest": {}}
    unexpected = []
    # DINOv2 and DINOv3 have a mask token and no decoder.
    has_decoder = any(name.startswith("decoder_") for name in weights)
    of_decoder = ("decoder_", "mask_token") if has_decoder else ("decoder_",)
    for name in weights:
        if name in needed:
            continue
        block = block_of(name)
        if block is not None and block >= depth:
            dropped["blocks"][name] = _num_entries(name, weights)
        elif _DROPPED.match(name):
            part = "decoder" if name.startswith(of_decoder) else "rest"
            dropped[part][name] = _num_entries(name, weights)
        elif not (_MAY_BE_ZERO.match(name) and not weights[name].any()):
            unexpected.append(name)
    problems = {"missing": missing, "misshapen": misshapen, "unreadable": unreadable}
    return {**problems, "unexpected": unexpected}, dropped


def _unreadable(name: str, weights: Weights) -> str:
    """Why the values of a needed tensor can't be used; empty where they can."""
    for key in weights.sources[name].names:
        place = weights.container.places[key]
        if place.problem:
            return place.problem
        if not place.dtype.is_floating_point:
            return f"is {str(place.dtype).removeprefix('torch.')}, not floating-point"
    return ""


def _same_shape(name: str, weights: Weights, tensor: Tensor, may_resize: bool) -> bool:
    try:
        stored = weights.like(name)
    except _BAD_PIECES:
        return False
    if stored.shape == tensor.shape:
        return True
    if name not in ("pos_embed", "decoder_pos_embed") or not may_resize:
        return False
    if stored.ndim != 3 or stored.shape[2] != tensor.shape[2]:
        return False
    return any(square_side(stored.shape[1] - prefix) for prefix in (0, 1))


def _shape_of(name: str, weights: Weights) -> str:
    try:
        return str(list(weights.like(name).shape))
    except _BAD_PIECES:
        keys = weights.sources[name].names
        return " + ".join(str(list(weights.container.places[key].shape)) for key in keys)


def _num_entries(name: str, weights: Weights) -> int:
    try:
        return weights.like(name).numel()
    except _BAD_PIECES:
        return sum(weights.container.like(key).numel() for key in weights.sources[name].names)


def _explain(
    weights: Weights, needed: dict[str, Tensor], problems: dict[str, list[str]], depth: int, may_resize: bool
) -> str:
    label = weights.label
    lists = "; ".join(f"{kind} {len(names)}: {_first(names)}" for kind, names in problems.items() if names)
    hints = _hints(weights, needed, problems, depth, may_resize)
    return (
        f"{label.weights} '{weights.path}' does not fit the {label.network} as format {weights.format}: "
        f"{lists}{''.join(f'; {hint}' for hint in hints)}; check the file, {label.keys()}"
    )


def _hints(
    weights: Weights, needed: dict[str, Tensor], problems: dict[str, list[str]], depth: int, may_resize: bool
) -> list[str]:
    """Possible explanations: missing files, a slice that ends too early, another format or size."""
    label = weights.label
    absent = weights.container.absent
    if absent:
        return [f"{len(absent)} of the index's files not here: {_first(absent)}"]
    last_block = weights.container.metadata.get("last_block", "")
    if last_block.isdigit():
        if any("blocks." in name for name in problems["missing"]):
            more = "for a deeper tap, slice again with a larger --last-block"
        else:
            more = "and nothing after them: for a tap of the output give the whole file"
        return [f"this slice holds blocks 1-{last_block}: {more}"]
    hints = []
    kind = describe_kind(weights.container)
    better = _better_format(weights, needed, bool(problems["missing"]), depth, may_resize)
    advice = label.set_format(better) if better else ""
    if kind:
        hints.append(f"the file looks like {kind}{f': {advice}' if advice else ''}")
    elif advice:
        hints.append(advice)
    misplaced = any(name.startswith("pos_embed ") for name in problems["misshapen"])
    if misplaced and not may_resize and label.img_size:
        hints.append(f"for another image size set {label.img_size}")
    return hints


def _better_format(
    weights: Weights, needed: dict[str, Tensor], names_are_missing: bool, depth: int, may_resize: bool
) -> str | None:
    """Another format under which the file fits.

    Where names are missing and none fits, one that has all the names, whatever the shapes.
    """
    others = []
    for format in FORMATS:
        try:
            # Opened again: another format may find its network elsewhere in the file.
            others.append(open_weights(weights.path, format, label=weights.label))
        except UserError:
            continue
    others.sort(key=lambda other: not other.in_own_entry)
    fitting = [other.format for other in others if fits(needed, other, depth=depth, may_resize=may_resize)]
    naming = [other.format for other in others if names_are_missing and needed.keys() <= other.keys()]
    return next(iter(fitting + naming), None)


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
