"""Keys of config.json that all of transformers' vision transformers have."""

from __future__ import annotations

from timm.layers.activations import QuickGELU
from torch import nn

from dmae_ds.errors import UserError
from dmae_ds.export.source import Source

ACTIVATIONS = {nn.GELU: "gelu", QuickGELU: "quick_gelu", nn.SiLU: "silu"}


def shared_config(source: Source, network: str) -> dict:
    """Return numbers, activation and epsilon of a student.

    network: transformers' one, for messages. Raises UserError for several epsilons and unknown activations.
    """
    block, vit = source.vit.blocks[0], source.vit
    epsilons = {module.eps for module in source.model.modules() if isinstance(module, nn.LayerNorm)}
    activation = ACTIVATIONS.get(type(block.mlp.act))
    if len(epsilons) != 1 or activation is None:
        raise UserError(
            f"transformers' {network} has one epsilon and GELU; this student has {sorted(epsilons)} and "
            f"{type(block.mlp.act).__name__}; export --to timm, safetensors or onnx"
        )
    return {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": epsilons.pop(),
        "image_size": source.img_size,
        "patch_size": source.patch_size,
        "num_channels": source.channels,
        "torch_dtype": "float32",
    }
