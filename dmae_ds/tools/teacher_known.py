"""Identify the network in a weights file: published vision transformers are tried one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.output.safetensors_header import is_safetensors
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.tools.early import read_overrides
from dmae_ds.weights.containers import open_container
from dmae_ds.weights.fit import block_of, check_fit, fits
from dmae_ds.weights.formats import FORMATS
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.load import open_format
from dmae_ds.weights.metadata import own_network
from dmae_ds.weights.named import Weights, open_weights
from dmae_ds.weights.places import Container
from dmae_ds.weights.positions import square_side
from dmae_ds.weights.roots import SeveralNetworks

# Tried in this order where no --name is given. The image size is that of the file's positional embedding.
NETWORKS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "vit_large_patch14_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    "vit_large_patch14_reg4_dinov2",
    "vit_giant_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",
    "vit_huge_plus_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_base_patch16_dinov3_qkvb",
    "vit_large_patch16_dinov3_qkvb",
    "vit_huge_plus_patch16_dinov3_qkvb",
    "vit_7b_patch16_dinov3",
    "vit_base_patch16_clip_224",
    "vit_large_patch14_clip_224",
    "vit_huge_patch14_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_so400m_patch14_siglip_224",
    "eva02_tiny_patch14_224",
    "eva02_small_patch14_224",
    "eva02_base_patch14_224",
    "eva02_large_patch14_224",
    "eva_giant_patch14_224",
)


@dataclass(frozen=True)
class Network:
    """The network of a file: `vit` has all blocks, on the meta device; `others` are names that fit too."""

    name: str
    overrides: dict
    vit: MaskedViT
    weights: Weights
    others: tuple[str, ...] = ()


def identify(
    path: Path,
    *,
    name: str | None,
    overrides: list[str],
    format: str,
    how_to_name: str = "give --name NAME and numbers such as embed_dim=128 depth=8",
) -> Network:
    """Return the network of a file: the one that the user or the file names, else the known one that fits.

    overrides: `key=value`, numbers in which the network differs from its name's
    how_to_name: what to do where no known network fits, for messages
    Raises UserError where none fits, with what the file holds.
    """
    keys = read_overrides(name, overrides)
    own = _open_own(path)
    if name is None and own is not None:
        name, numbers = own_network(own)
        keys = {**numbers, **keys}
        format = "dmae_ds" if format == "auto" else format
    if name is not None:
        last_block = None if own is None else own.metadata.get("last_block")
        return _open_named(path, name, keys, format, last_block)
    opened = _open_all(path, format)
    fitting = [network for name in NETWORKS if (network := _try(name, keys, opened)) is not None]
    if not fitting:
        raise UserError(
            f"'{path}' holds {_geometry(opened)}; none of the {len(NETWORKS)} known networks fits: "
            f"{how_to_name}"
        )
    first, *others = fitting
    return replace(first, others=tuple(other.name for other in others))


def _open_own(path: Path) -> Container | None:
    """Open a file or folder of ours, which names its network; None for others."""
    if path.is_file() and not is_safetensors(path) and not path.name.endswith(".json"):
        return None
    container = open_container(path, label=TEACHER)
    return container if "timm_name" in container.metadata else None


def _open_named(path: Path, name: str, keys: dict, format: str, last_block: str | None) -> Network:
    """Open the file as the network of this name; last_block: of a slice, which has no blocks above it."""
    vit = meta_teacher(name, keys, int(last_block) if last_block else None)
    resize = "img_size" in keys
    weights = open_format(
        path, vit.state_dict(), format=format, depth=vit.depth, may_resize=resize, label=TEACHER
    )
    check_fit(vit.state_dict(), weights, depth=vit.depth, may_resize=resize)
    return Network(name, keys, vit, weights)


def _open_all(path: Path, format: str) -> list[Weights]:
    """Open the file with every key map, or with the named one. Raises UserError where none can."""
    opened, first_error = [], None
    for chosen in FORMATS if format == "auto" else [format]:
        try:
            opened.append(open_weights(path, chosen, label=TEACHER))
        except SeveralNetworks:
            raise
        except UserError as error:
            first_error = first_error or error
    if not opened:
        raise first_error
    opened.sort(key=lambda weights: not weights.in_own_entry)
    return [weights for weights in opened if weights.format != "dmae_ds"]  # a file of ours names its network


def _try(name: str, keys: dict, opened: list[Weights]) -> Network | None:
    """Return the network of this name if the file fits it strictly; the image size may be the file's."""
    opened = [weights for weights in opened if _may_be(name, keys, weights)]
    if not opened:
        return None
    vit = meta_teacher(name, keys)
    for weights in opened:
        numbers = dict(keys)
        if "img_size" not in keys and vit.pos_embed is not None and "pos_embed" in weights:
            numbers |= _own_size(vit, weights)
        sized = vit if numbers == keys else meta_teacher(name, numbers)
        if fits(sized.state_dict(), weights, depth=sized.depth, may_resize="img_size" in keys):
            return Network(name, numbers, sized, weights)
    return None


def _may_be(name: str, keys: dict, weights: Weights) -> bool:
    """Whether patch size and width agree, which is cheap to check before a network is built."""
    if "patch_embed.proj.weight" not in weights:
        return False
    width, _, _, patch = (*weights.like("patch_embed.proj.weight").shape, 0, 0, 0)[:4]
    if "patch_size" not in keys and f"patch{patch}_" not in name:
        return False
    one = meta_teacher(name, keys, 1)
    return one.embed_dim == width and one.patch_size == patch


def _own_size(vit: MaskedViT, weights: Weights) -> dict:
    """{"img_size": ...} where the file's positional embedding has another square grid than the name's."""
    side = square_side(weights.like("pos_embed").shape[1] - vit.num_prefix_positions)
    return {"img_size": side * vit.patch_size} if side and (side, side) != vit.grid else {}


def _geometry(opened: list[Weights]) -> str:
    """Describe width, blocks and patch size by the tensors, under the format that maps the most blocks."""
    if not opened:
        return "a network of ours that its name does not fit"
    weights = max(opened, key=_num_blocks)
    kind = describe_kind(weights.container) or f"{len(weights)} tensors such as {next(iter(weights), 'none')}"
    if "patch_embed.proj.weight" in weights:
        shape = weights.like("patch_embed.proj.weight").shape
        kind += f", width {shape[0]}, {_num_blocks(weights)} blocks, patches of {shape[-1]} px"
    return kind


def _num_blocks(weights: Weights) -> int:
    return len({block_of(name) for name in weights} - {None})


def dtype_of(weights: Weights) -> str:
    """Dtypes of the file's tensors (fp32, bf16, ...), the one with the most bytes first."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    counts: dict[str, int] = {}
    for place in weights.container.places.values():
        kind = short.get(place.dtype, str(place.dtype).removeprefix("torch."))
        counts[kind] = counts.get(kind, 0) + place.num_bytes
    return ", ".join(sorted(counts, key=counts.get, reverse=True))
