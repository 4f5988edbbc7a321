"""Initial weights of networks: MAE's published scheme, and what other families of ViTs add to it."""

from __future__ import annotations

import torch
from torch import nn

TOKENS = (
    "cls_token",
    "reg_token",
    "mask_token",
    "pos_embed",
    "latent",
)  # `latent`: an attention pool's query


def initialize_as_mae(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise as MAE's published code does.

    Matrices are Xavier-uniform (the patch projection as a matrix), biases zero, gains one, tokens and learned
    positional embeddings N(0, .02^2).
    """
    for name, parameter in module.named_parameters():
        if name.endswith(TOKENS):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        elif name.endswith("bias"):  # also where the module is a single layer
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def initialize_layer_scale(network: nn.Module) -> None:
    """Set layer scale to the value with which timm's network of that name begins (DINOv2, DINOv3: 1e-5)."""
    for module in network.modules():
        if getattr(module, "init_values", None) is None:
            continue
        for name in ("gamma", "gamma_1", "gamma_2"):  # of timm's LayerScale, and of Eva's blocks
            if getattr(module, name, None) is not None:
                nn.init.constant_(getattr(module, name), module.init_values)


def match_key_bias(network: nn.Module) -> None:
    """Give EVA's key biases, which are zero buffers, the dtype of the query's: one product takes both."""
    for module in network.modules():
        if getattr(module, "k_bias", None) is not None:
            module.k_bias = module.k_bias.to(module.q_bias.dtype)


def freeze(module: nn.Module) -> None:
    """Turn a module's parameters into buffers of the same names.

    They are saved and exported as before, and the optimiser does not know them. Every ZeRO stage and
    checkpoint would have to treat a parameter without a gradient; a buffer concerns none of them.
    """
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            delattr(submodule, name)
            submodule.register_buffer(name, parameter.detach())
