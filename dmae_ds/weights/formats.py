"""Checkpoint formats: named key maps, chosen in the recipe (`teacher.format`), never guessed in silence.

A map takes a name of the file to timm's name for it: "blocks.3.attn.qkv.weight". Parts of one tensor end in #0, #1, #2
and are joined along the first axis; None says that the name is known and not needed. Your own map:

    teacher.format: my_lab.checkpoints:to_timm      # a function str -> str | None, or a Format

imports `my_lab.checkpoints`, which may register a network of yours with timm at the same time.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, KeysView, Mapping

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.containers import Container, join_containers, open_container


@dataclass(frozen=True)
class Source:
    """Where one of timm's tensors comes from: names in the file, and how those tensors make it."""

    names: tuple[str, ...]
    make: Callable[..., Tensor]


Sources = dict[str, Source]


@dataclass(frozen=True)
class Format:
    """One way of naming a vision transformer's tensors.

    rename: a name of the file -> timm's (see the module's docstring); finish: what no renaming can say, on the whole map
    entries: names under which a .pth may hold the weights; none of them there: the top level
    """

    about: str
    rename: Callable[[str], str | None]
    entries: tuple[str, ...] = ()
    finish: Callable[[Sources], Sources] = lambda sources: sources


def _only(tensor: Tensor) -> Tensor:
    return tensor


def _stack_parts(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _rules(*rules: tuple[str, str | None]) -> Callable[[str], str | None]:
    """A rename from (regular expression, replacement) pairs, each applied in turn; a replacement of None: not needed."""
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]

    def rename(name: str) -> str | None:
        for pattern, replacement in compiled:
            if replacement is None:
                if pattern.search(name):
                    return None
            else:
                name = pattern.sub(replacement, name)
        return name

    return rename


def _registers_stand_apart(sources: Sources) -> Sources:
    """DINOv2 adds CLS's position code and then slips the registers in; timm's `*_reg4_dinov2` adds it to CLS for good."""
    if not {"cls_token", "reg_token", "pos_embed"} <= sources.keys():
        return sources
    (cls,), (pos,) = sources["cls_token"].names, sources["pos_embed"].names
    return {
        **sources,
        "cls_token": Source((cls, pos), lambda cls_token, pos_embed: cls_token + pos_embed[:, :1]),
        "pos_embed": Source((pos,), lambda pos_embed: pos_embed[:, 1:]),
    }


def _split_masked_bias(sources: Sources) -> Sources:
    """DINOv3's qkv bias has a key third that is masked to zero; timm keeps the other two as q_bias and v_bias."""
    found = {}
    for name, source in sources.items():
        if name.endswith("attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            found[f"{stem}q_bias"] = Source(source.names, lambda bias: bias.chunk(3)[0])
            found[f"{stem}v_bias"] = Source(source.names, lambda bias: bias.chunk(3)[2])
        else:
            found[name] = source
    return found


# transformers' ViT, ViTMAE, DINOv2 (with registers or without) and DINOv3, as published and as saved by version 5.
_rename_hf = _rules(
    (
        r"^(?=(blocks|patch_embed)\.|(pos_embed|cls_token|reg_token)$)",
        "not_transformers.",
    ),  # timm's names are another format
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.decoder_(layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_)?", "decoder_"),
    (r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.", ""),
    (r"^pooler\.", None),
    (r"^classifier\.", "head."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.", ""),
    (r"^register_tokens$", "reg_token"),
    (r"^position_embeddings$", "pos_embed"),
    (r"^patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.)?layer\.", "blocks."),
    (r"attention\.attention\.query\.", "attn.qkv#0."),
    (r"attention\.attention\.key\.", "attn.qkv#1."),
    (r"attention\.attention\.value\.", "attn.qkv#2."),
    (r"attention\.(q_proj)\.weight", "attn.qkv#0.weight"),
    (r"attention\.(k_proj)\.weight", "attn.qkv#1.weight"),
    (r"attention\.(v_proj)\.weight", "attn.qkv#2.weight"),
    (r"attention\.([qv])_proj\.bias", r"attn.\1_bias"),
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"^layernorm\.", "norm."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"mlp\.(weights_in)\.", "mlp.fc1."),
    (r"mlp\.(weights_out|down_proj)\.", "mlp.fc2."),
    (r"mlp\.gate_proj\.", "mlp.fc1_g."),
    (r"mlp\.up_proj\.", "mlp.fc1_x."),
    (r"(.*)#(\d)(.*)", r"\1\3#\2"),
)


def _finish_hf(sources: Sources) -> Sources:
    """DINOv3's rotary networks have no position codes and other names for layer scale and an ungated MLP."""
    if "pos_embed" in sources:
        return _registers_stand_apart(sources)
    gated = any("mlp.fc1_g." in name for name in sources)
    found = {}
    for name, source in sources.items():
        name = re.sub(r"ls(\d)\.gamma$", r"gamma_\1", name)
        found[name if gated else name.replace("mlp.fc1_x.", "mlp.fc1.")] = source
    return found


FORMATS: dict[str, Format] = {
    "timm": Format("timm's own names", _only, entries=("state_dict",)),
    "mae": Format(
        "the published MAE and DMAE files (timm's names in an entry `model`, decoder_* beside them)",
        _only,
        entries=("model",),
    ),
    "hf": Format(
        "transformers' ViT-MAE, ViT, DINOv2 and DINOv3, a folder or a hub id", _rename_hf, finish=_finish_hf
    ),
    "dinov2": Format(
        "the published dinov2_*_pretrain.pth, and the teacher of a DINOv2 run",
        _rules(
            (r"^(dino_head|ibot_head)\.", None),
            (r"^backbone\.", ""),
            (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
            (r"^register_tokens$", "reg_token"),
            (r"mlp\.w12\.", "mlp.fc1."),
            (r"mlp\.w3\.", "mlp.fc2."),
        ),
        entries=("teacher",),
        finish=_registers_stand_apart,
    ),
    "dinov3": Format(
        "the published dinov3_*_pretrain*.pth",
        _rules(
            (r"^(dino_head|ibot_head)\.", None),
            (r"^backbone\.", ""),
            (r"^(rope_embed\.periods|local_cls_norm\..*)$|\.bias_mask$", None),
            (r"^storage_tokens$", "reg_token"),
            (r"ls(\d)\.gamma", r"gamma_\1"),
            (r"mlp\.w12\.", "mlp.fc1."),
            (r"mlp\.w1\.", "mlp.fc1_g."),
            (r"mlp\.w2\.", "mlp.fc1_x."),
            (r"mlp\.w3\.", "mlp.fc2."),
        ),
        entries=("teacher",),
        finish=_split_masked_bias,
    ),
    "dmae_ds": Format(
        "our own student.safetensors, a run folder that holds one, or a folder made by `dmae-ds teacher slice`",
        _only,
    ),
}


class Weights(Mapping):
    """A weights file under timm's names: {name: tensor}, each read when it is asked for.

    ignored: names of the file that the format knows and has no use for
    """

    def __init__(self, container: Container, format: str, sources: Sources, ignored: list[str]):
        self.container, self.format, self.sources, self.ignored = container, format, sources, ignored

    @property
    def path(self) -> Path:
        return self.container.path

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        return source.make(*(self.container[key] for key in source.names))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, name: object) -> bool:
        return name in self.sources  # Mapping's own would read the tensor

    def like(self, name: str) -> Tensor:
        """A tensor on the meta device: its shape and dtype, without reading it."""
        source = self.sources[name]
        return source.make(*(self.container.like(key) for key in source.names))

    def num_bytes(self, names: list[str]) -> int:
        """Bytes of the file that these tensors are made of, each counted once."""
        keys = {key for name in names for key in self.sources[name].names}
        return sum(self.container.places[key].num_bytes for key in keys)


def find_format(name: str) -> Format:
    """The format of this name, or the one that `module:attribute` imports. Raises UserError."""
    if name in FORMATS:
        return FORMATS[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"teacher.format '{name}' can't be imported ({error}); choose {', '.join(FORMATS)}, auto, or module:function"
        ) from None
    if isinstance(found, Format):
        return found
    if not callable(found):
        raise UserError(
            f"teacher.format '{name}' is a {type(found).__name__}; give a function from the file's names to timm's, or a dmae_ds.weights.formats.Format"
        )
    return Format(f"your own, {name}", found)


def map_names(container: Container, format: str) -> Weights:
    """The container under timm's names. Raises UserError where two names of the file mean the same tensor."""
    chosen = find_format(format)
    parts: dict[str, dict[int, str]] = {}
    ignored = []
    for key in container:
        name = chosen.rename(key)
        if name is None:
            ignored.append(key)
        else:
            stem, _, part = name.partition("#")
            other = parts.setdefault(stem, {}).setdefault(int(part or 0), key)
            if other != key:
                raise UserError(
                    f"teacher.weights '{container.path}' holds {name} twice as format {format}: '{other}' and '{key}'; keep the one that is meant"
                )
    sources = {
        name: Source(tuple(keys[part] for part in sorted(keys)), _only if len(keys) == 1 else _stack_parts)
        for name, keys in parts.items()
    }
    return Weights(container, format, chosen.finish(sources), ignored)


def open_weights(path: Path, format: str) -> Weights:
    """Open a weights file, an index or a folder in a named format (not `auto`: see `choose_format`).

    Raises UserError where it is missing, damaged, not of this format, or wants to run code.
    """
    formats: dict[str, list[str]] = {}
    for name, known in FORMATS.items():
        for entry in known.entries:
            formats.setdefault(entry, []).append(name)
    return map_names(open_container(path, find_format(format).entries, formats), format)


# The decoder of a run of ours, under the published names; what else was trained beside the student is no part of it.
_OWN_DECODER = re.compile(r"decoder\.((?:embed|pos_embed|blocks|norm|pred)(?:\.|$).*)")


def with_own_decoder(weights: Weights) -> Weights:
    """A student of ours together with the decoder that lies beside it, in decoder.safetensors; other files as they are."""
    beside = (weights.path if weights.path.is_dir() else weights.path.parent) / "decoder.safetensors"
    if (
        weights.format != "dmae_ds"
        or any(name.startswith("decoder_") for name in weights)
        or not beside.is_file()
    ):
        return weights
    decoder = open_container(beside)
    names = {
        name: "mask_token" if name == "decoder.mask_token" else _OWN_DECODER.sub(r"decoder_\1", name)
        for name in decoder
    }
    names = {name: ours for name, ours in names.items() if ours != name}
    joined = join_containers(
        weights.path, [weights.container, Container(beside, {name: decoder.places[name] for name in names})]
    )
    joined.absent = weights.container.absent
    return Weights(
        joined,
        weights.format,
        weights.sources | {ours: Source((name,), _only) for name, ours in names.items()},
        weights.ignored,
    )


def choose_format(
    path: Path, fits: Callable[[Weights], bool], needed: KeysView[str] | frozenset = frozenset()
) -> Weights:
    """`format: auto`: the one map under which the file fits; several that name the same tensors are one.

    needed: the names that are looked for, to say which format came nearest
    Raises UserError where none or more than one does.
    """
    found: list[Weights] = []
    opened: list[Weights] = []
    errors = []
    for format in FORMATS:
        try:
            weights = open_weights(path, format)
        except UserError as error:
            errors.append(error)
            continue
        opened.append(weights)
        same = any(
            {name: source.names for name, source in weights.sources.items()}
            == {name: source.names for name, source in other.sources.items()}
            for other in found
        )
        if fits(weights) and not same:
            found.append(weights)
    if len(found) == 1:
        return found[0]
    if len(errors) == len(FORMATS):
        raise errors[0]
    if found:
        raise UserError(
            f"teacher.weights '{path}' fits the formats {', '.join(w.format for w in found)}, with different tensors; set teacher.format to the right one"
        )
    nearest = min(opened, key=lambda weights: len(needed - weights.keys()))
    missing = [name for name in needed if name not in nearest]
    said = (
        f"missing {len(missing)}: {', '.join(missing[:3])}"
        if missing
        else "with other shapes, or names left over"
    )
    raise UserError(
        f"teacher.weights '{path}' fits the teacher under no known format; nearest is {nearest.format}, {said}; set teacher.name and teacher.format"
    )
