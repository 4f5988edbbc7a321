"""Tiny networks of other implementations and their weights in published layouts: what our teachers are held against."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths
from dmae_ds.weights.fit import check_fit
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.named import Weights, open_weights

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TAP, TAPS = 2, ("block/2",)
IDS = torch.tensor([[3, 0, 9, 7], [15, 2, 4, 8]])  # in an order of their own, another one for each picture


@dataclass
class Reference:
    """A tiny network of another implementation, and its weights in a published layout.

    tensors: as they are named in the file; save: (folder, tensors) -> what teacher.weights names
    whole: pictures -> the residual stream after block TAP, by the implementation's own forward
    embed: pictures -> (tokens [N, R + 16, 32], what every block is given besides, one row a patch, or None)
    blocks: (tokens of one picture, rows) -> tokens
    """

    name: str
    format: str
    tensors: dict[str, Tensor]
    save: Callable[[Path, dict], Path]
    whole: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    blocks: list[Callable]
    overrides: dict = field(default_factory=lambda: SHAPE)
    num_prefix: int = 1  # tokens in front of the patches, CLS first
    has_cls: bool = True
    first_matrix: str = "mlp.fc1"  # a matrix of a block that is not square, by timm's name
    model: nn.Module | None = None

    @torch.no_grad()
    def features(self, pictures: Tensor, ids: Tensor | None) -> Tensor:
        """[N, 1 + K, D]: CLS, where there is one, and the kept patches, picture by picture; no ids: all, by the network's own forward."""
        if ids is None:
            tokens = self.whole(pictures)
        else:
            embedded, rows = self.embed(pictures)
            kept = []
            for one, keep in zip(embedded, ids, strict=True):
                one = torch.cat([one[: self.num_prefix], one[self.num_prefix :][keep]])[None]
                for block in self.blocks[:TAP]:
                    one = block(one, None if rows is None else rows[keep])
                kept.append(one)
            tokens = torch.cat(kept)
        patches = tokens[:, self.num_prefix :]
        return torch.cat([tokens[:, :1], patches], dim=1) if self.has_cls else patches


def shake(model: nn.Module) -> nn.Module:
    """No norm, bias, token or layer scale stays at a value that would hide a wrong place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def as_safetensors(folder: Path, tensors: dict, name: str = "model.safetensors", **metadata: str) -> Path:
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / name,
        metadata=metadata or None,
    )
    return folder / name


def as_pth(entry: str | None = None, **beside) -> Callable[[Path, dict], Path]:
    def save(folder: Path, tensors: dict) -> Path:
        torch.save({entry: tensors, **beside} if entry else tensors, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"

    return save


def timm_reference(
    name: str, format: str, rename: Callable[[dict], dict] = dict, save=as_safetensors, **keys
) -> Reference:
    """timm's own network `name`, its state dict renamed to the layout by hand."""
    model = shake(timm.create_model(name, num_classes=0, **SHAPE))

    def whole(pictures: Tensor) -> Tensor:
        _, (found,) = model.forward_intermediates(
            pictures, indices=[TAP - 1], return_prefix_tokens=True, output_fmt="NLC", norm=False
        )
        return found if isinstance(found, Tensor) else torch.cat([found[1], found[0]], dim=1)

    def embed(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        found = model._pos_embed(model.patch_embed(pictures))
        tokens, angles = found if isinstance(found, tuple) else (found, None)
        return model.norm_pre(tokens), angles

    def block(module: nn.Module) -> Callable:
        return lambda tokens, angles: module(tokens) if angles is None else module(tokens, rope=angles)

    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return Reference(
        name,
        format,
        rename(state),
        save,
        whole,
        embed,
        [block(module) for module in model.blocks],
        num_prefix=model.num_prefix_tokens,
        has_cls=model.cls_token is not None,
        model=model,
        **keys,
    )


MAE_DECODER = {
    "mask_token": (1, 1, 16),
    "decoder_pos_embed": (1, 17, 16),
    "decoder_embed.weight": (16, 32),
    "decoder_blocks.0.attn.qkv.weight": (48, 16),
    "decoder_norm.weight": (16,),
    "decoder_pred.weight": (192, 16),
}


def mae() -> Reference:
    return timm_reference(
        "vit_tiny_patch16_224",
        "mae",
        lambda state: state | {key: torch.randn(shape) for key, shape in MAE_DECODER.items()},
        as_pth("model"),
    )


def mae_finetuned() -> Reference:
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
    beside = {
        "optimizer": {"state": {0: {"exp_avg": torch.randn(7)}}},
        "epoch": 3,
        "scaler": {},
        "args": argparse.Namespace(lr=1e-3, model="mae"),
    }
    return timm_reference("vit_tiny_patch16_224", "mae", save=as_pth("model", **beside))


def dinov2_names(state: dict) -> dict:
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
    """timm's network without registers, where they are slipped in by hand after the position codes, as DINOv2 does."""
    reference = timm_reference("vit_small_patch14_dinov2", "dinov2", save=as_pth())
    registers = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    plain = reference.embed

    def embed(pictures: Tensor) -> tuple[Tensor, None]:
        tokens, _ = plain(pictures)
        return torch.cat([tokens[:, :1], registers.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1), None

    def whole(pictures: Tensor) -> Tensor:
        tokens, _ = embed(pictures)
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
    """The teacher of a training run: blocks in chunks (two, then one), heads beside the backbone."""
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
    """Meta's names: one qkv bias whose key third is masked away (and holds something here, to see that it is)."""
    found = {
        "rope_embed.periods": torch.rand(4),
        "mask_token": torch.randn(1, 32),
        "local_cls_norm.weight": torch.randn(32),
    }
    renamed = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    if "blocks.0.mlp.fc1_g.weight" in state:
        renamed += [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")]
    for key, tensor in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        if key.endswith("qkv.weight"):
            stem = key.removesuffix("weight")
            query, value = (
                state.get(key.replace("qkv.weight", name), torch.zeros(32)) for name in ("q_bias", "v_bias")
            )
            has_bias = key.replace("qkv.weight", "q_bias") in state
            found[f"{stem}bias"] = torch.cat([query, torch.randn(32) if has_bias else torch.zeros(32), value])
            found[f"{stem}bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
        for ours, theirs in renamed:
            key = key.replace(ours, theirs)
        found[key] = tensor
    return found


def dinov3(name: str = "vit_small_patch16_dinov3", **keys) -> Reference:
    return timm_reference(name, "dinov3", dinov3_names, as_pth(), **keys)


def dinov3_training() -> Reference:
    reference = dinov3()
    reference.tensors = {f"backbone.{key}": tensor for key, tensor in reference.tensors.items()} | {
        "dino_head.mlp.0.weight": torch.randn(3, 32)
    }
    reference.save = as_pth("teacher")
    return reference


def own_student() -> Reference:
    metadata = {"timm_name": "vit_tiny_patch16_224", "timm_overrides": json.dumps(SHAPE)}
    return timm_reference(
        "vit_tiny_patch16_224",
        "dmae_ds",
        save=lambda folder, tensors: as_safetensors(folder, tensors, "student.safetensors", **metadata),
    )


# --- transformers ---

HF_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def hf_reference(model: nn.Module, name: str, **keys) -> Reference:
    """A network of transformers; its tensors are what save_pretrained writes."""
    shake(model)
    masks_itself = "MAE" in type(model).__name__
    noise = (
        {"noise": torch.arange(16.0).expand(2, -1)} if masks_itself else {}
    )  # keeps every patch in its place
    encoder = getattr(model, "vit", model)
    layers = next(
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == SHAPE["depth"]
    )

    def embed(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = encoder.embeddings(pictures, **noise)
        rope = getattr(model, "rope_embeddings", None)  # pictures -> cosine and sine, each [L, D / heads]
        return tokens[0] if masks_itself else tokens, None if rope is None else torch.stack(
            rope(pictures), dim=1
        )

    def block(module: nn.Module) -> Callable:
        def run(tokens: Tensor, angles: Tensor | None) -> Tensor:
            found = (
                module(tokens)
                if angles is None
                else module(tokens, position_embeddings=tuple(angles.unbind(1)))
            )
            return found if isinstance(found, Tensor) else found[0]

        return run

    def whole(pictures: Tensor) -> Tensor:
        return encoder(pictures, output_hidden_states=True, **noise).hidden_states[TAP]

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
        **keys,
    )


def hf_networks(t) -> dict[str, Callable[[], Reference]]:
    """t: the package; eps and GELU are those of timm's networks, so that nothing but names can differ."""
    vit = {**HF_SHAPE, "intermediate_size": 128, "layer_norm_eps": 1e-6}
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    four = {"num_prefix": 5}
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
            **four,
        ),
        "hf-dinov3": lambda: hf_reference(
            t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, intermediate_size=128)),
            "vit_small_patch16_dinov3_qkvb",
            **four,
        ),
        "hf-dinov3-gated": lambda: hf_reference(
            t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, **gated)),
            "vit_small_plus_patch16_dinov3_qkvb",
            first_matrix="mlp.fc1_x",
            **four,
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
ONE_OF_EACH = [
    "timm-pth",
    "mae",
    "dinov2-registers",
    "dinov2-giant",
    "dinov3",
    "dinov3-gated-qkvb",
    "dmae_ds",
    "hf-mae",
    "hf-dinov2-swiglu",
    "hf-dinov3",
]


@cache
def build_reference(what: str) -> Reference:
    torch.manual_seed(0)
    return (OTHERS if what in OTHERS else hf_networks(pytest.importorskip("transformers")))[what]()


PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def load_teacher(
    name: str,
    overrides: dict,
    *,
    whole_blocks: int,
    weights: Weights,
    taps: tuple[str, ...],
    dtype: str,
    device: torch.device,
) -> FrozenTeacher:
    """The blocks up to the deepest tap, filled from an opened file: what a run's teacher is before it is verified."""
    vit = meta_teacher(name, overrides, needed_depths(taps, whole_blocks)[0])
    may_resize = "img_size" in overrides
    parts = fill(
        vit,
        weights,
        whole_blocks=whole_blocks,
        may_resize=may_resize,
        dtype=DTYPES[dtype],
        device=device,
        network=(name, overrides),
    )
    return FrozenTeacher(vit, taps, parts)


def load(
    reference: Reference,
    path: Path,
    format: str | None = None,
    *,
    taps: tuple[str, ...] = TAPS,
    dtype: str = "fp32",
) -> FrozenTeacher:
    return load_teacher(
        reference.name,
        reference.overrides,
        whole_blocks=3,
        weights=open_weights(path, format or reference.format, label=TEACHER),
        taps=taps,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@cache
def needed_by(name: str, shape: tuple) -> dict[str, Tensor]:
    return meta_teacher(name, dict(shape), TAP).state_dict()


def fit(reference: Reference, path: Path, format: str | None = None) -> None:
    """What loading begins with, without building the network anew."""
    check_fit(
        needed_by(reference.name, tuple(reference.overrides.items())),
        open_weights(path, format or reference.format, label=TEACHER),
        depth=TAP,
        may_resize=False,
    )


def features(teacher: FrozenTeacher, ids: Tensor | None) -> Tensor:
    ids = torch.arange(16).expand(2, -1) if ids is None else ids
    visible = gather_patches(patchify(PICTURES, 8), ids)
    return teacher.features(PatchBatch(visible=visible, masked=None, ids_keep=ids, ids_masked=None))[
        "block/2"
    ]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def refusal(call: Callable, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(reference: Reference, folder: Path, change: str) -> dict[str, Tensor]:
    """The file's tensors with one matrix of the first block spoilt."""
    weights = open_weights(reference.save(folder, reference.tensors), reference.format)
    (key,) = weights.sources[f"blocks.0.{reference.first_matrix}.weight"].names
    tensors = dict(reference.tensors)
    if change == "removed":
        del tensors[key]
    elif change == "renamed":
        tensors[f"{key}x"] = tensors.pop(key)
    elif change == "transposed":
        tensors[key] = tensors[key].T.contiguous()
    elif change == "another":
        tensors[key.removesuffix("weight") + "bonus"] = torch.ones(3)
    return tensors
