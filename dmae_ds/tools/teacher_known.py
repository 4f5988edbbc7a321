"""Which network a weights file holds: the published large vision transformers by timm's names, each tried in earnest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from dmae_ds.config.run import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.frozen import meta_teacher
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

# Tried in this order where no --name is given. Their pictures' size is taken from the file's position codes.
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
    """A file's network: `vit` on the meta device, all its blocks; `others` fit the same file as well."""

    name: str
    overrides: dict
    vit: MaskedViT
    weights: Weights
    others: tuple[str, ...] = ()


def identify(path: Path, *, name: str | None, overrides: list[str], format: str) -> Network:
    """The network that a file surely holds: named by the user or by the file itself, else the known one that fits.

    overrides: `key=value`, numbers that differ from the name's
    Raises UserError where nothing fits, with what was found.
    """
    keys = _read_overrides(name, overrides)
    own = _open_own(path)
    if name is None and own is not None:
        name, numbers = own_network(own)
        keys, format = {**numbers, **keys}, "dmae_ds" if format == "auto" else format
    if name is not None:
        return _named(path, name, keys, format, None if own is None else own.metadata.get("last_block"))
    opened = _open_all(path, format)
    found = [fit for candidate in NETWORKS for fit in [_try(candidate, keys, opened)] if fit is not None]
    if not found:
        raise UserError(
            f"'{path}' holds {_geometry(opened)}; none of the {len(NETWORKS)} known networks fits: give --name NAME and numbers such as embed_dim=128 depth=8"
        )
    first = found[0]
    return Network(
        first.name, first.overrides, first.vit, first.weights, tuple(other.name for other in found[1:])
    )


def _read_overrides(name: str | None, overrides: list[str]) -> dict:
    pairs = dict(text.partition("=")[::2] for text in overrides)
    try:
        return ModelConfig(
            name=name or "unnamed", **{key: yaml.safe_load(value) for key, value in pairs.items()}
        ).overrides()
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        first = (
            error.errors()[0] if isinstance(error, ValidationError) else {"loc": overrides, "msg": str(error)}
        )
        known = ", ".join(field for field in ModelConfig.model_fields if field != "name")
        raise UserError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; numbers of a network are {known}"
        ) from None


def _open_own(path: Path) -> Container | None:
    """A file or a folder of ours, which names its network; None for anything else."""
    if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".json"):
        return None
    container = open_container(path, label=TEACHER)
    return container if "timm_name" in container.metadata else None


def _named(path: Path, name: str, keys: dict, format: str, last_block: str | None) -> Network:
    """last_block: of a slice, whose upper blocks were left behind on purpose."""
    vit = meta_teacher(name, keys, int(last_block) if last_block else None)
    resize = "img_size" in keys
    weights = open_format(
        path, vit.state_dict(), format=format, depth=vit.depth, may_resize=resize, label=TEACHER
    )
    check_fit(vit.state_dict(), weights, depth=vit.depth, may_resize=resize)
    return Network(name, keys, vit, weights)


def _open_all(path: Path, format: str) -> list[Weights]:
    """The file under every key map, or the one that was named. Raises UserError where none can open it."""
    opened, first_error = [], None
    for chosen in FORMATS if format == "auto" else [format]:
        try:
            opened.append(open_weights(path, chosen, label=TEACHER))
        except UserError as error:
            first_error = first_error or error
    if not opened:
        raise first_error
    return [weights for weights in opened if weights.format != "dmae_ds"]  # a file of ours names its network


def _try(name: str, keys: dict, opened: list[Weights]) -> Network | None:
    """The network of this name if the file holds it, strictly; the picture's size may be the file's own."""
    opened = [weights for weights in opened if _may_be(name, keys, weights)]
    if not opened:
        return None
    vit = meta_teacher(name, keys)
    for weights in opened:
        size = (
            {}
            if "img_size" in keys or vit.pos_embed is None or "pos_embed" not in weights
            else _own_size(vit, weights)
        )
        sized = meta_teacher(name, {**keys, **size}) if size else vit
        if fits(sized.state_dict(), weights, depth=sized.depth, may_resize="img_size" in keys):
            return Network(name, {**keys, **size}, sized, weights)
    return None


def _may_be(name: str, keys: dict, weights: Weights) -> bool:
    """A cheap look before a network is built: patch size in the name, then width."""
    if "patch_embed.proj.weight" not in weights:
        return False
    width, _, _, patch = (*weights.like("patch_embed.proj.weight").shape, 0, 0, 0)[:4]
    if "patch_size" not in keys and f"patch{patch}_" not in name:
        return False
    one = meta_teacher(name, keys, 1)
    return one.embed_dim == width and one.patch_size == patch


def _own_size(vit: MaskedViT, weights: Weights) -> dict:
    """{"img_size": ...} where the file's position codes are of another square grid than the name's."""
    side = square_side(weights.like("pos_embed").shape[1] - vit.num_prefix_positions)
    return {"img_size": side * vit.patch_size} if side and (side, side) != vit.grid else {}


def _geometry(opened: list[Weights]) -> str:
    """Width, blocks and patch size as the keys tell them, under the format that names the most."""
    if not opened:
        return "a network of ours that its name does not fit"
    weights = max(opened, key=lambda weights: len({block_of(name) for name in weights}))
    kind = describe_kind(weights.container) or f"{len(weights)} tensors such as {next(iter(weights), 'none')}"
    if "patch_embed.proj.weight" in weights:
        shape = weights.like("patch_embed.proj.weight").shape
        kind += f", width {shape[0]}, {len({block_of(name) for name in weights} - {None})} blocks, patches of {shape[-1]} px"
    return kind


def dtype_of(weights: Weights) -> str:
    """fp32, bf16, ... of the file's tensors, the most frequent first."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    counts: dict[str, int] = {}
    for place in weights.container.places.values():
        kind = short.get(place.dtype, str(place.dtype).removeprefix("torch."))
        counts[kind] = counts.get(kind, 0) + place.num_bytes
    return ", ".join(sorted(counts, key=counts.get, reverse=True))
