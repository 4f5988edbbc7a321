"""Weights in the layouts of published files (timm, MAE, DINOv2, DINOv3, ours): timm's networks, renamed."""

from __future__ import annotations

import argparse
import json
from typing import Callable

import torch
from torch import Tensor

from tests.teacher.reference import SHAPE, TAP, Reference, as_pth, as_safetensors, timm_reference

MAE_DECODER = {
    "mask_token": (1, 1, 16),
    "decoder_pos_embed": (1, 17, 16),
    "decoder_embed.weight": (16, 32),
    "decoder_blocks.0.attn.qkv.weight": (48, 16),
    "decoder_norm.weight": (16,),
    "decoder_pred.weight": (192, 16),
}


def mae() -> Reference:
    """An MAE with its decoder."""
    return timm_reference(
        "vit_tiny_patch16_224",
        "mae",
        lambda state: state | {key: torch.randn(shape) for key, shape in MAE_DECODER.items()},
        as_pth("model"),
    )


def mae_finetuned() -> Reference:
    """MAE's fine-tuned classifier, which norms after pooling."""

    def rename(state: dict) -> dict:
        above = {
            "fc_norm.weight": state["norm.weight"],
            "fc_norm.bias": state["norm.bias"],
            "head.weight": torch.randn(5, 32),
            "head.bias": torch.randn(5),
        }
        return {key: tensor for key, tensor in state.items() if not key.startswith("norm.")} | above

    return timm_reference("vit_tiny_patch16_224", "mae", rename, as_pth("model"))


def mae_training() -> Reference:
    """A checkpoint of MAE's training, with its optimiser and arguments."""
    others = {
        "optimizer": {"state": {0: {"exp_avg": torch.randn(7)}}},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(lr=1e-3, model="mae"),
    }
    return timm_reference("vit_tiny_patch16_224", "mae", save=as_pth("model", **others))


def dinov2_names(state: dict) -> dict:
    """Rename a SwiGLU network to DINOv2's names."""
    return {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor
        for key, tensor in state.items()
    } | {"mask_token": torch.randn(1, 32)}


def dinov2() -> Reference:
    return timm_reference(
        "vit_small_patch14_dinov2",
        "dinov2",
        lambda state: state | {"mask_token": torch.randn(1, 32)},
        as_pth(),
    )


def dinov2_giant() -> Reference:
    return timm_reference("vit_giant_patch14_dinov2", "dinov2", dinov2_names, as_pth())


def dinov2_registers() -> Reference:
    """timm's network without registers, which are inserted after the positional embedding, as in DINOv2."""
    reference = timm_reference("vit_small_patch14_dinov2", "dinov2", save=as_pth())
    registers = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    plain = reference.embed

    def embed(images: Tensor) -> tuple[Tensor, None]:
        tokens, _ = plain(images)
        return torch.cat([tokens[:, :1], registers.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1), None

    def whole(images: Tensor) -> Tensor:
        tokens, _ = embed(images)
        for block in reference.blocks[:TAP]:
            tokens = block(tokens, None)
        return tokens

    tensors = reference.tensors | {"register_tokens": registers, "mask_token": torch.randn(1, 32)}
    return Reference(
        "vit_small_patch14_reg4_dinov2",
        "dinov2",
        tensors,
        as_pth(),
        whole,
        embed,
        reference.blocks,
        num_prefix=5,
    )


def dinov2_training() -> Reference:
    """The teacher of a training run: blocks in chunks (two, then one), heads next to the backbone."""
    reference = dinov2_registers()
    chunked = {
        key.replace("blocks.2.", "blocks.1.2.")
        if "blocks.2." in key
        else key.replace("blocks.", "blocks.0."): t
        for key, t in reference.tensors.items()
    }
    reference.tensors = {f"backbone.{key}": tensor for key, tensor in chunked.items()} | {
        "dino_head.mlp.0.weight": torch.randn(3, 32),
        "ibot_head.last": torch.randn(3),
    }
    reference.save = as_pth("teacher")
    return reference


def dinov3_names(state: dict) -> dict:
    """Rename to Meta's names: one qkv bias, whose key third is masked (it is not zero here, to test this)."""
    renamed = {
        "rope_embed.periods": torch.rand(4),
        "mask_token": torch.randn(1, 32),
        "local_cls_norm.weight": torch.randn(32),
    }
    names = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    if "blocks.0.mlp.fc1_g.weight" in state:
        names += [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")]
    for key, tensor in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        if key.endswith("qkv.weight"):
            stem = key.removesuffix("weight")
            query, value = (
                state.get(key.replace("qkv.weight", name), torch.zeros(32)) for name in ("q_bias", "v_bias")
            )
            has_bias = key.replace("qkv.weight", "q_bias") in state
            renamed[f"{stem}bias"] = torch.cat(
                [query, torch.randn(32) if has_bias else torch.zeros(32), value]
            )
            renamed[f"{stem}bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    return renamed


def dinov3(name: str = "vit_small_patch16_dinov3", **kwargs) -> Reference:
    return timm_reference(name, "dinov3", dinov3_names, as_pth(), **kwargs)


def dinov3_training() -> Reference:
    """The teacher of a training run, heads next to the backbone."""
    reference = dinov3()
    reference.tensors = {f"backbone.{key}": tensor for key, tensor in reference.tensors.items()} | {
        "dino_head.mlp.0.weight": torch.randn(3, 32)
    }
    reference.save = as_pth("teacher")
    return reference


def own_student() -> Reference:
    """A student.safetensors of ours, with its metadata."""
    metadata = {"timm_name": "vit_tiny_patch16_224", "timm_overrides": json.dumps(SHAPE)}
    return timm_reference(
        "vit_tiny_patch16_224",
        "dmae_ds",
        save=lambda folder, tensors: as_safetensors(folder, tensors, "student.safetensors", **metadata),
    )


# Reference networks by the name that tests give them.
OTHERS: dict[str, Callable[[], Reference]] = {
    "timm": lambda: timm_reference("vit_tiny_patch16_224", "timm"),
    "timm-pth": lambda: timm_reference("vit_tiny_patch16_224", "timm", save=as_pth("state_dict", epoch=3)),
    "timm-registers": lambda: timm_reference("vit_small_patch14_reg4_dinov2", "timm"),
    "mae": mae,
    "mae-finetuned": mae_finetuned,
    "mae-training": mae_training,
    "dinov2": dinov2,
    "dinov2-giant": dinov2_giant,
    "dinov2-registers": dinov2_registers,
    "dinov2-training": dinov2_training,
    "dinov3": dinov3,
    "dinov3-training": dinov3_training,
    "dinov3-qkvb": lambda: dinov3("vit_small_patch16_dinov3_qkvb"),
    "dinov3-gated": lambda: dinov3("vit_small_plus_patch16_dinov3", first_matrix="mlp.fc1_g"),
    "dinov3-gated-qkvb": lambda: dinov3("vit_small_plus_patch16_dinov3_qkvb", first_matrix="mlp.fc1_g"),
    "dmae_ds": own_student,
}
