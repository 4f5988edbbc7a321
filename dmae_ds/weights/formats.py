"""Checkpoint formats: named key maps, chosen in the recipe (`teacher.format`), never guessed silently.

A map takes a name of the file to timm's name for it: "blocks.3.attn.qkv.weight". Pieces of one tensor end in
#0, #1, #2 and are joined along the first axis; None means that the name is known and not needed. A map of
your own:

    teacher.format: my_lab.checkpoints:to_timm      # a function str -> str | None, or a Format

imports `my_lab.checkpoints`, which may also register a network of yours with timm. Such a function is given
the name of every tensor in a checkpoint, its entries joined by dots ("ema.net.blocks.0.norm1.weight"), and
returns None for what is not part of the network.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from dmae_ds.config.own_code import import_own
from dmae_ds.errors import UserError
from dmae_ds.weights.label import WEIGHTS, Label
from dmae_ds.weights.roots import ANYTHING


def split_pieces(tensor: Tensor, *pieces: Tensor) -> tuple[Tensor, ...]:
    """Return the pieces, of the old sizes, of which a tensor is joined along its first axis."""
    return tensor.split([len(piece) for piece in pieces])


@dataclass(frozen=True)
class Source:
    """Names in the file from which one of timm's tensors is made, and the function that makes it.

    undo: timm's tensor and the file's old ones -> the file's new ones, from which `make` makes it
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor]
    undo: Callable[..., tuple[Tensor, ...]] = split_pieces


Sources = dict[str, Source]


# The patch projection under timm's and Meta's names, and under transformers'.
_TIMM_ANCHOR = re.compile(r"(?P<root>(.*\.)?)patch_embed\.proj\.weight$")
_HF_ANCHOR = re.compile(
    r"(?P<root>(.*?\.)??)((vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.)?"
    r"embeddings\.patch_embeddings\.(projection\.)?weight$"
)


@dataclass(frozen=True)
class Format:
    """One way of naming a vision transformer's tensors.

    about: the files that have it, in words
    rename: takes a name of the file to timm's (see the module's docstring)
    anchor: matches the patch projection, and as its group `root` what stands in front of every name of the
    network (roots.py); None: names are taken as they are
    entries: names under which a .pth holds the weights. With an anchor they only tell formats with the same
    names apart; without one the first that is there is read, else the top level
    finish: changes the whole map where renaming is not enough
    """

    about: str
    rename: Callable[[str], str | None]
    entries: tuple[str, ...] = ()
    anchor: re.Pattern | None = None
    finish: Callable[[Sources], Sources] = lambda sources: sources


def keep(tensor: Tensor) -> Tensor:
    """Return the tensor as it is in the file."""
    return tensor


def join_pieces(*pieces: Tensor) -> Tensor:
    """Join the pieces of a tensor along its first axis."""
    return torch.cat(pieces)


def _rules(*rules: tuple[str, str | None]) -> Callable[[str], str | None]:
    """Make a rename from (regular expression, replacement) pairs, applied in turn.

    A replacement of None means that names which match are not needed.
    """
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


def _add_position_to_cls(sources: Sources) -> Sources:
    """Add the positional embedding of CLS to CLS itself, as timm's `*_reg4_dinov2` networks have it.

    DINOv2 adds it first and inserts the registers, which have none, afterwards.
    """
    if not {"cls_token", "reg_token", "pos_embed"} <= sources.keys():
        return sources
    (cls,), (pos,) = sources["cls_token"].names, sources["pos_embed"].names
    return {
        **sources,
        "cls_token": Source(
            (cls, pos),
            lambda cls_token, pos_embed: cls_token + pos_embed[:, :1],
            lambda tensor, cls_token, pos_embed: (tensor - pos_embed[:, :1], pos_embed),
        ),
        "pos_embed": Source(
            (pos,),
            lambda pos_embed: pos_embed[:, 1:],
            lambda tensor, pos_embed: (torch.cat([pos_embed[:, :1], tensor], dim=1),),
        ),
    }


def _third(names: tuple[str, ...], place: int) -> Source:
    """The source of a third of a file's tensor."""

    def undo(tensor: Tensor, whole: Tensor) -> tuple[Tensor]:
        thirds = list(whole.chunk(3))
        thirds[place] = tensor
        return (torch.cat(thirds),)

    return Source(names, lambda whole: whole.chunk(3)[place], undo)


def _split_masked_bias(sources: Sources) -> Sources:
    """Split DINOv3's qkv bias, whose key third is masked to zero, into timm's q_bias and v_bias."""
    split = {}
    for name, source in sources.items():
        if name.endswith("attn.qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            for part, place in (("q_bias", 0), ("v_bias", 2)):
                split[f"{stem}{part}"] = _third(source.names, place)
        else:
            split[name] = source
    return split


# transformers' ViT, ViTMAE, DINOv2 (with or without registers) and DINOv3, published or saved by version 5.
_rename_hf = _rules(
    # timm's own names are another format.
    (
        r"^(?=(\w+\.)?((blocks|patch_embed)\.|(pos_embed|reg_token)$)|(model\.)?cls_token$)",
        "not_transformers.",
    ),
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
    """Rename layer scale and an ungated MLP of DINOv3, which has no positional embedding."""
    if "pos_embed" in sources:
        return _add_position_to_cls(sources)
    gated = any("mlp.fc1_g." in name for name in sources)
    finished = {}
    for name, source in sources.items():
        name = re.sub(r"ls(\d)\.gamma$", r"gamma_\1", name)
        finished[name if gated else name.replace("mlp.fc1_x.", "mlp.fc1.")] = source
    return finished


FORMATS: dict[str, Format] = {
    "timm": Format(
        "timm's own names", keep, entries=("state_dict_ema", "model_ema", "state_dict"), anchor=_TIMM_ANCHOR
    ),
    "mae": Format(
        "the published MAE and DMAE files (timm's names in an entry `model`, decoder_* next to them)",
        keep,
        entries=("model",),
        anchor=_TIMM_ANCHOR,
    ),
    "hf": Format(
        "transformers' ViT-MAE, ViT, DINOv2 and DINOv3, a folder or a hub id",
        _rename_hf,
        anchor=_HF_ANCHOR,
        finish=_finish_hf,
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
        anchor=_TIMM_ANCHOR,
        finish=_add_position_to_cls,
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
        anchor=_TIMM_ANCHOR,
        finish=_split_masked_bias,
    ),
    "dmae_ds": Format(
        "our own student.safetensors, a run folder that holds one, or a folder made by `dmae-ds teacher "
        "slice`",
        keep,
        anchor=_TIMM_ANCHOR,
    ),
}


def find_format(name: str, *, label: Label = WEIGHTS) -> Format:
    """Return the format of this name, or the one that `module:attribute` imports. Raises UserError."""
    if name in FORMATS:
        return FORMATS[name]
    key = label.format or "the format"
    try:
        imported = import_own(name)
    except ImportError as error:
        raise UserError(
            f"{key} '{name}' can't be imported ({error}); choose {', '.join(FORMATS)}, auto, or "
            "module:function"
        ) from None
    if isinstance(imported, Format):
        return imported
    if not callable(imported):
        raise UserError(
            f"{key} '{name}' is of type {type(imported).__name__}; give a function from the file's names to "
            "timm's, or a dmae_ds.weights.formats.Format"
        )
    return Format(f"your own, {name}", imported, anchor=ANYTHING)
