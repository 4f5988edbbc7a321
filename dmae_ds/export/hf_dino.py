"""transformers' layouts of DINOv2, DINOv2 with registers, and DINOv3: names of the published files, config.

Parts of a file that training does not have are what the published ones have or begin with: a mask token of
zeros; in DINOv3 zero biases of query and value where timm's network has none; in DINOv2 with registers a zero
positional embedding of CLS, which timm adds to CLS itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.export.hf_config import shared_config
from dmae_ds.export.source import Source

# timm's name inside a block -> transformers', or the three that a tensor is cut into
Inside = dict[str, tuple[str, ...]]


def _inside(layers: dict[str, str | tuple[str, ...]], gammas: dict[str, str]) -> Inside:
    """Add `.weight` and `.bias` to names of layers; layer scales have names of their own."""
    names: Inside = {timm: (theirs,) for timm, theirs in gammas.items()}
    for timm, theirs in layers.items():
        for kind in ("weight", "bias"):
            several = (theirs,) if isinstance(theirs, str) else theirs
            names[f"{timm}.{kind}"] = tuple(f"{each}.{kind}" for each in several)
    return names


@dataclass(frozen=True)
class Layout:
    """One of transformers' classes and its tensors' names."""

    class_name: str
    model_type: str
    block: str  # a block's number goes into {}
    outside: dict[str, str]
    inside: Inside


_SCALES = {1: "layer_scale1.lambda1", 2: "layer_scale2.lambda1"}
_DINOV2 = {
    "block": "encoder.layer.{}",
    "outside": {
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    "inside": _inside(
        {
            **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
            "attn.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
            "attn.proj": "attention.output.dense",
        },
        {f"ls{number}.gamma": name for number, name in _SCALES.items()},
    ),
}
DINOV2 = Layout("Dinov2Model", "dinov2", **_DINOV2)
DINOV2_REGISTERS = Layout("Dinov2WithRegistersModel", "dinov2_with_registers", **_DINOV2)
DINOV3 = Layout(
    "DINOv3ViTModel",
    "dinov3_vit",
    block="layer.{}",
    outside={
        "cls_token": "embeddings.cls_token",
        "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
    inside=_inside(
        {
            **{name: name for name in ("norm1", "norm2")},
            "attn.qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc1_g": "mlp.gate_proj",
            "mlp.fc1_x": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
        },
        {
            **{f"gamma_{number}": name for number, name in _SCALES.items()},
            "attn.q_bias": "attention.q_proj.bias",
            "attn.v_bias": "attention.v_proj.bias",
        },
    ),
)


def find_layout(source: Source) -> Layout | None:
    """Return the layout that has the student's tokens, layer scale and positions; None for plain ViTs."""
    names, has_registers = source.tensors, "reg_token" in source.tensors
    if "blocks.0.gamma_1" in names and "pos_embed" not in names and "cls_token" in names:
        return DINOV3
    if "blocks.0.ls1.gamma" not in names or "pos_embed" not in names or "cls_token" not in names:
        return None
    is_own_row = source.vit.num_prefix_positions == 1  # CLS has a positional embedding of its own
    if has_registers:
        return None if source.vit.num_prefix_positions else DINOV2_REGISTERS
    return DINOV2 if is_own_row else None


def dino_tensors(source: Source, layout: Layout) -> dict[str, Tensor]:
    """Return the student's tensors under transformers' names, with those that only transformers has.

    Raises UserError for a tensor that transformers' network lacks, such as a norm of queries.
    """
    width = source.vit.embed_dim
    renamed: dict[str, Tensor] = {}
    for name, tensor in source.tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            targets = [layout.outside[name]] if name in layout.outside else []
        else:
            stem = layout.block.format(block[1])
            targets = [f"{stem}.{inner}" for inner in layout.inside.get(block[2], ())]
        if not targets:
            raise UserError(
                f"transformers' {layout.class_name} has no tensor for '{name}'; "
                "export --to timm, safetensors or onnx"
            )
        chunks = tensor.chunk(len(targets))
        renamed |= {target: chunk.clone().contiguous() for target, chunk in zip(targets, chunks, strict=True)}
    if layout is DINOV3:
        renamed["embeddings.mask_token"] = torch.zeros(1, 1, width)
        for number in range(len(source.vit.blocks)):
            for part in "qv":
                renamed.setdefault(f"layer.{number}.attention.{part}_proj.bias", torch.zeros(width))
        return renamed
    renamed["embeddings.mask_token"] = torch.zeros(1, width)
    if layout is DINOV2_REGISTERS:
        positions = renamed["embeddings.position_embeddings"]
        renamed["embeddings.position_embeddings"] = torch.cat([torch.zeros(1, 1, width), positions], dim=1)
    return renamed


def dino_config(source: Source, layout: Layout) -> dict:
    """Return the content of config.json. Raises UserError for an MLP that the layout cannot have."""
    vit = source.vit
    block, num_registers = vit.blocks[0], vit.num_prefix - vit.num_cls
    config = shared_config(source, layout.class_name) | {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        "layerscale_value": 1.0,  # only of new networks
    }
    if layout is DINOV3:
        gated = hasattr(block.mlp, "fc1_g")
        first = block.mlp.fc1_g if gated else block.mlp.fc1
        return config | {
            "intermediate_size": first.out_features,
            "use_gated_mlp": gated,
            "num_register_tokens": num_registers,
            "rope_theta": 100.0,  # of all published networks; with another one the check of outputs fails
        }
    ratio = block.mlp.fc1.out_features / vit.embed_dim
    if not ratio.is_integer() or block.mlp.fc2.in_features != block.mlp.fc1.out_features:
        raise UserError(
            f"transformers' {layout.class_name} has an MLP of a whole multiple of the width, this student "
            f"one of {ratio:g}, or a gated one; export --to timm, safetensors or onnx"
        )
    registers = {"num_register_tokens": num_registers} if layout is DINOV2_REGISTERS else {}
    return config | {"mlp_ratio": int(ratio), "qkv_bias": block.attn.qkv.bias is not None, **registers}
