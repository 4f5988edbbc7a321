"""Networks of transformers and the files that its save_pretrained writes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.teacher.reference import SHAPE, TAP, Reference, as_safetensors, shake

HF_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def hf_reference(model: nn.Module, name: str, **kwargs) -> Reference:
    """A network of transformers with the tensors that save_pretrained writes."""
    shake(model)
    masks_itself = "MAE" in type(model).__name__
    # This noise keeps every patch in its place.
    noise = {"noise": torch.arange(16.0).expand(2, -1)} if masks_itself else {}
    encoder = getattr(model, "vit", model)
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == SHAPE["depth"]
    )

    def embed(images: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = encoder.embeddings(images, **noise)
        rope = getattr(model, "rope_embeddings", None)  # images -> cosine and sine, each [L, D / heads]
        return tokens[0] if masks_itself else tokens, None if rope is None else torch.stack(
            rope(images), dim=1
        )

    def block(module: nn.Module) -> Callable:
        def run(tokens: Tensor, angles: Tensor | None) -> Tensor:
            out = (
                module(tokens)
                if angles is None
                else module(tokens, position_embeddings=tuple(angles.unbind(1)))
            )
            return out if isinstance(out, Tensor) else out[0]

        return run

    def whole(images: Tensor) -> Tensor:
        return encoder(images, output_hidden_states=True, **noise).hidden_states[TAP]

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    return Reference(
        name,
        "hf",
        tensors,
        as_safetensors,
        whole,
        embed,
        [block(layer) for layer in layers],
        model=model,
        **kwargs,
    )


def hf_networks(t) -> dict[str, Callable[[], Reference]]:
    """Builders of references by name. t: the package.

    eps and GELU are those of timm's networks, so that only names can differ.
    """
    vit = {**HF_SHAPE, "intermediate_size": 128, "layer_norm_eps": 1e-6}
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    registers = {"num_prefix": 5}
    dinov3 = {**HF_SHAPE, "num_register_tokens": 4}
    gated = {"intermediate_size": 128, "use_gated_mlp": True, "hidden_act": "silu"}
    return {
        "hf-mae": lambda: hf_reference(
            t.ViTMAEForPreTraining(t.ViTMAEConfig(**vit, **decoder, mask_ratio=0.0)), "vit_tiny_patch16_224"
        ),
        "hf-vit": lambda: hf_reference(t.ViTModel(t.ViTConfig(**vit)), "vit_tiny_patch16_224"),
        "hf-classifier": lambda: hf_reference(
            t.ViTForImageClassification(t.ViTConfig(**vit)), "vit_tiny_patch16_224"
        ),
        "hf-dinov2": lambda: hf_reference(
            t.Dinov2Model(t.Dinov2Config(**HF_SHAPE)), "vit_small_patch14_dinov2"
        ),
        "hf-dinov2-swiglu": lambda: hf_reference(
            t.Dinov2Model(t.Dinov2Config(**HF_SHAPE, use_swiglu_ffn=True)),
            "vit_giant_patch14_dinov2",
            overrides={**SHAPE, "mlp_ratio": 2 * 88 / 32},
        ),
        "hf-dinov2-registers": lambda: hf_reference(
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**HF_SHAPE, num_register_tokens=4)),
            "vit_small_patch14_reg4_dinov2",
            **registers,
        ),
        "hf-dinov3": lambda: hf_reference(
            t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, intermediate_size=128)),
            "vit_small_patch16_dinov3_qkvb",
            **registers,
        ),
        "hf-dinov3-gated": lambda: hf_reference(
            t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, **gated)),
            "vit_small_plus_patch16_dinov3_qkvb",
            first_matrix="mlp.fc1_x",
            **registers,
        ),
    }


HF = [
    "hf-mae",
    "hf-vit",
    "hf-classifier",
    "hf-dinov2",
    "hf-dinov2-swiglu",
    "hf-dinov2-registers",
    "hf-dinov3",
    "hf-dinov3-gated",
]
