"""Every format: a file of that layout gives the features of the network it was saved from; one that doesn't fit is one line."""

from __future__ import annotations

import argparse
import json
import sys
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

from dmae_ds.config.run import TeacherConfig
from dmae_ds.errors import UserError
from dmae_ds.models.masking import MaskedBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.teacher.fit import check_fit, describe_kind, fits
from dmae_ds.teacher.formats import FORMATS, Format, choose_format, map_names, open_weights
from dmae_ds.teacher.frozen import FrozenTeacher, load_teacher, meta_teacher
from dmae_ds.teacher.hub import locate

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
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata=metadata or None)
    return folder / name


def as_pth(entry: str | None = None, **beside) -> Callable[[Path, dict], Path]:
    def save(folder: Path, tensors: dict) -> Path:
        torch.save({entry: tensors, **beside} if entry else tensors, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"

    return save


def timm_reference(name: str, format: str, rename: Callable[[dict], dict] = dict, save=as_safetensors, **keys) -> Reference:
    """timm's own network `name`, its state dict renamed to the layout by hand."""
    model = shake(timm.create_model(name, num_classes=0, **SHAPE))

    def whole(pictures: Tensor) -> Tensor:
        _, (found,) = model.forward_intermediates(pictures, indices=[TAP - 1], return_prefix_tokens=True, output_fmt="NLC", norm=False)
        return found if isinstance(found, Tensor) else torch.cat([found[1], found[0]], dim=1)

    def embed(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        found = model._pos_embed(model.patch_embed(pictures))
        tokens, angles = found if isinstance(found, tuple) else (found, None)
        return model.norm_pre(tokens), angles

    def block(module: nn.Module) -> Callable:
        return lambda tokens, angles: module(tokens) if angles is None else module(tokens, rope=angles)

    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return Reference(
        name, format, rename(state), save, whole, embed, [block(module) for module in model.blocks],
        num_prefix=model.num_prefix_tokens, has_cls=model.cls_token is not None, model=model, **keys,
    )  # fmt: skip


MAE_DECODER = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 16), "decoder_embed.weight": (16, 32), "decoder_blocks.0.attn.qkv.weight": (48, 16),
               "decoder_norm.weight": (16,), "decoder_pred.weight": (192, 16)}  # fmt: skip


def mae() -> Reference:
    return timm_reference("vit_tiny_patch16_224", "mae", lambda state: state | {key: torch.randn(shape) for key, shape in MAE_DECODER.items()}, as_pth("model"))


def mae_finetuned() -> Reference:
    def rename(state: dict) -> dict:
        above = {"fc_norm.weight": state["norm.weight"], "fc_norm.bias": state["norm.bias"], "head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)}
        return {key: tensor for key, tensor in state.items() if not key.startswith("norm.")} | above

    return timm_reference("vit_tiny_patch16_224", "mae", rename, as_pth("model"))


def mae_training() -> Reference:
    beside = {"optimizer": {"state": {0: {"exp_avg": torch.randn(7)}}}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1e-3, model="mae")}
    return timm_reference("vit_tiny_patch16_224", "mae", save=as_pth("model", **beside))


def dinov2_names(state: dict) -> dict:
    return {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): tensor for key, tensor in state.items()} | {"mask_token": torch.randn(1, 32)}


def dinov2() -> Reference:
    return timm_reference("vit_small_patch14_dinov2", "dinov2", lambda state: state | {"mask_token": torch.randn(1, 32)}, as_pth())


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
    return Reference("vit_small_patch14_reg4_dinov2", "dinov2", tensors, as_pth(), whole, embed, reference.blocks, num_prefix=5)


def dinov2_training() -> Reference:
    """The teacher of a training run: blocks in chunks (two, then one), heads beside the backbone."""
    reference = dinov2_registers()
    chunked = {key.replace("blocks.2.", "blocks.1.2.") if "blocks.2." in key else key.replace("blocks.", "blocks.0."): t for key, t in reference.tensors.items()}
    reference.tensors = {f"backbone.{key}": tensor for key, tensor in chunked.items()} | {"dino_head.mlp.0.weight": torch.randn(3, 32), "ibot_head.last": torch.randn(3)}
    reference.save = as_pth("teacher")
    return reference


def dinov3_names(state: dict) -> dict:
    """Meta's names: one qkv bias whose key third is masked away (and holds something here, to see that it is)."""
    found = {"rope_embed.periods": torch.rand(4), "mask_token": torch.randn(1, 32), "local_cls_norm.weight": torch.randn(32)}
    renamed = [("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")]
    if "blocks.0.mlp.fc1_g.weight" in state:
        renamed += [("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")]
    for key, tensor in state.items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        if key.endswith("qkv.weight"):
            stem = key.removesuffix("weight")
            query, value = (state.get(key.replace("qkv.weight", name), torch.zeros(32)) for name in ("q_bias", "v_bias"))
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
    reference.tensors = {f"backbone.{key}": tensor for key, tensor in reference.tensors.items()} | {"dino_head.mlp.0.weight": torch.randn(3, 32)}
    reference.save = as_pth("teacher")
    return reference


def own_student() -> Reference:
    metadata = {"timm_name": "vit_tiny_patch16_224", "timm_overrides": json.dumps(SHAPE)}
    return timm_reference("vit_tiny_patch16_224", "dmae_ds", save=lambda folder, tensors: as_safetensors(folder, tensors, "student.safetensors", **metadata))


# --- transformers ---

HF_SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def hf_reference(model: nn.Module, name: str, **keys) -> Reference:
    """A network of transformers; its tensors are what save_pretrained writes."""
    shake(model)
    masks_itself = "MAE" in type(model).__name__
    noise = {"noise": torch.arange(16.0).expand(2, -1)} if masks_itself else {}  # keeps every patch in its place
    encoder = getattr(model, "vit", model)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == SHAPE["depth"])

    def embed(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = encoder.embeddings(pictures, **noise)
        rope = getattr(model, "rope_embeddings", None)  # pictures -> cosine and sine, each [L, D / heads]
        return tokens[0] if masks_itself else tokens, None if rope is None else torch.stack(rope(pictures), dim=1)

    def block(module: nn.Module) -> Callable:
        def run(tokens: Tensor, angles: Tensor | None) -> Tensor:
            found = module(tokens) if angles is None else module(tokens, position_embeddings=tuple(angles.unbind(1)))
            return found if isinstance(found, Tensor) else found[0]

        return run

    def whole(pictures: Tensor) -> Tensor:
        return encoder(pictures, output_hidden_states=True, **noise).hidden_states[TAP]

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
    return Reference(name, "hf", tensors, as_safetensors, whole, embed, [block(layer) for layer in layers], model=model, **keys)


def hf_networks(t) -> dict[str, Callable[[], Reference]]:
    """t: the package; eps and GELU are those of timm's networks, so that nothing but names can differ."""
    vit = {**HF_SHAPE, "intermediate_size": 128, "layer_norm_eps": 1e-6}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    four = {"num_prefix": 5}
    dinov3 = {**HF_SHAPE, "num_register_tokens": 4}
    gated = {"intermediate_size": 128, "use_gated_mlp": True, "hidden_act": "silu"}
    return {
        "hf-mae": lambda: hf_reference(t.ViTMAEForPreTraining(t.ViTMAEConfig(**vit, **decoder, mask_ratio=0.0)), "vit_tiny_patch16_224"),
        "hf-vit": lambda: hf_reference(t.ViTModel(t.ViTConfig(**vit)), "vit_tiny_patch16_224"),
        "hf-classifier": lambda: hf_reference(t.ViTForImageClassification(t.ViTConfig(**vit)), "vit_tiny_patch16_224"),
        "hf-dinov2": lambda: hf_reference(t.Dinov2Model(t.Dinov2Config(**HF_SHAPE)), "vit_small_patch14_dinov2"),
        "hf-dinov2-swiglu": lambda: hf_reference(
            t.Dinov2Model(t.Dinov2Config(**HF_SHAPE, use_swiglu_ffn=True)), "vit_giant_patch14_dinov2", overrides={**SHAPE, "mlp_ratio": 2 * 88 / 32}
        ),
        "hf-dinov2-registers": lambda: hf_reference(
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**HF_SHAPE, num_register_tokens=4)), "vit_small_patch14_reg4_dinov2", **four
        ),
        "hf-dinov3": lambda: hf_reference(t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, intermediate_size=128)), "vit_small_patch16_dinov3_qkvb", **four),
        "hf-dinov3-gated": lambda: hf_reference(
            t.DINOv3ViTModel(t.DINOv3ViTConfig(**dinov3, **gated)), "vit_small_plus_patch16_dinov3_qkvb", first_matrix="mlp.fc1_x", **four
        ),
    }


HF = ["hf-mae", "hf-vit", "hf-classifier", "hf-dinov2", "hf-dinov2-swiglu", "hf-dinov2-registers", "hf-dinov3", "hf-dinov3-gated"]
OTHERS: dict[str, Callable[[], Reference]] = {
    "timm": lambda: timm_reference("vit_tiny_patch16_224", "timm"),
    "timm-pth": lambda: timm_reference("vit_tiny_patch16_224", "timm", save=as_pth("state_dict", epoch=3)),
    "timm-registers": lambda: timm_reference("vit_small_patch14_reg4_dinov2", "timm"),
    "mae": mae, "mae-finetuned": mae_finetuned, "mae-training": mae_training,
    "dinov2": dinov2, "dinov2-giant": dinov2_giant, "dinov2-registers": dinov2_registers, "dinov2-training": dinov2_training,
    "dinov3": dinov3, "dinov3-training": dinov3_training,
    "dinov3-qkvb": lambda: dinov3("vit_small_patch16_dinov3_qkvb"),
    "dinov3-gated": lambda: dinov3("vit_small_plus_patch16_dinov3", first_matrix="mlp.fc1_g"),
    "dinov3-gated-qkvb": lambda: dinov3("vit_small_plus_patch16_dinov3_qkvb", first_matrix="mlp.fc1_g"),
    "dmae_ds": own_student,
}  # fmt: skip
ONE_OF_EACH = ["timm-pth", "mae", "dinov2-registers", "dinov2-giant", "dinov3", "dinov3-gated-qkvb", "dmae_ds", "hf-mae", "hf-dinov2-swiglu", "hf-dinov3"]


@pytest.fixture(scope="module", params=[*OTHERS, *HF])
def reference(request) -> Reference:
    return build_reference(request.param)


@cache
def build_reference(what: str) -> Reference:
    torch.manual_seed(0)
    return (OTHERS if what in OTHERS else hf_networks(pytest.importorskip("transformers")))[what]()


PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def load(reference: Reference, path: Path, format: str | None = None, *, taps: tuple[str, ...] = TAPS, dtype: str = "fp32") -> FrozenTeacher:
    return load_teacher(
        reference.name, reference.overrides, whole_blocks=3, weights=open_weights(path, format or reference.format), taps=taps, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip


@cache
def needed_by(name: str, shape: tuple) -> dict[str, Tensor]:
    return meta_teacher(name, dict(shape), TAP).state_dict()


def fit(reference: Reference, path: Path, format: str | None = None) -> None:
    """What loading begins with, without building the network anew."""
    check_fit(needed_by(reference.name, tuple(reference.overrides.items())), open_weights(path, format or reference.format), depth=TAP, may_resize=False)


def features(teacher: FrozenTeacher, ids: Tensor | None) -> Tensor:
    ids = torch.arange(16).expand(2, -1) if ids is None else ids
    visible = gather_patches(patchify(PICTURES, 8), ids)
    return teacher.features(MaskedBatch(visible=visible, masked=None, ids_keep=ids, ids_masked=None))["block/2"]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "masked"])
def test_features_are_those_of_the_network_the_file_was_saved_from(tmp_path, reference, ids):
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    assert_close(features(teacher, ids), reference.features(PICTURES, ids))


@torch.no_grad()
def test_every_tensor_shows_in_the_features(tmp_path, reference):
    """So that no wrong place can hide behind a zero, or a part that is never run."""
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    before = features(teacher, IDS)
    for name, tensor in teacher.vit.state_dict().items():
        if name.startswith("blocks.1."):
            continue  # as blocks.0
        kept = tensor.clone()
        tensor.copy_(tensor.flip(0, -1) if tensor.ndim > 1 else tensor.flip(0))
        assert not torch.allclose(features(teacher, IDS), before, rtol=1e-3), name
        tensor.copy_(kept)


@pytest.mark.parametrize("what", ["timm", "timm-pth", "mae-training", "dinov2-giant", "hf-vit"])
def test_loading_reads_every_needed_tensor_once_and_checking_none(tmp_path, what):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    weights = open_weights(path, reference.format)
    needed = needed_by(reference.name, tuple(reference.overrides.items()))
    check_fit(needed, weights, depth=TAP, may_resize=False)
    assert weights.container.bytes_read == 0
    load_teacher(reference.name, reference.overrides, whole_blocks=3, weights=weights, taps=TAPS, dtype="fp32", device=torch.device("cpu"))
    assert weights.container.bytes_read == sum(tensor.nbytes for tensor in needed.values())
    again = choose(reference, path)
    with pytest.raises(UserError):
        check_fit(needed | {"more": torch.empty(1)}, again, depth=TAP, may_resize=False)
    assert again.container.bytes_read <= 3 * 2 * 96 * 4  # qkv biases: under a format that splits them they must be looked at


@pytest.mark.parametrize("what", HF)
def test_every_way_in_which_transformers_saves_is_read(tmp_path, what):
    reference = build_reference(what)
    expected = reference.features(PICTURES, IDS)
    reference.model.save_pretrained(tmp_path / "folder")
    reference.model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    (tmp_path / "bin").mkdir()
    torch.save(reference.tensors, tmp_path / "bin" / "pytorch_model.bin")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    for folder in ("folder", "sharded", "bin"):
        assert_close(features(load(reference, tmp_path / folder), IDS), expected)


# --- what does not fit ---


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


@pytest.mark.parametrize(
    "change, words",
    [
        ("removed", "missing 1: {name}.weight"), ("renamed", "missing 1: {name}.weight; unexpected 1: {name}.weightx"),
        ("transposed", "misshapen 1: {name}.weight [32, "), ("another", "unexpected 1: {name}.bonus"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_a_spoilt_tensor_is_named(tmp_path, what, change, words):
    reference = build_reference(what)
    message = refusal(fit, reference, reference.save(tmp_path, changed(reference, tmp_path, change)))
    assert words.format(name=f"blocks.0.{reference.first_matrix}") in message


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_every_tensor_is_missed_where_it_is_removed(tmp_path, what):
    reference = build_reference(what)
    needed = meta_teacher(reference.name, reference.overrides, 1).state_dict()
    weights = open_weights(reference.save(tmp_path, reference.tensors), reference.format)
    covers = fits(needed, depth=1, may_resize=False)
    assert covers(weights)
    for key in {key for name in needed for key in weights.sources[name].names}:
        place = weights.container.places.pop(key)
        assert not covers(map_names(weights.container, reference.format)), key
        weights.container.places[key] = place


@pytest.mark.parametrize("what, key", [("dinov2-registers", "cls_token"), ("dinov2-registers", "pos_embed"), ("dinov2-registers", "register_tokens"), ("dinov3", "storage_tokens")])
def test_a_network_with_registers_misses_each_of_its_tokens(tmp_path, what, key):
    reference = build_reference(what)
    tensors = {name: tensor for name, tensor in reference.tensors.items() if name != key}
    assert "missing 1: " + key.replace("register_tokens", "reg_token").replace("storage_tokens", "reg_token") in refusal(fit, reference, reference.save(tmp_path, tensors))


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_third_of_a_joined_matrix_is_missed(tmp_path, part):
    reference = build_reference("hf-vit")
    tensors = {name: tensor for name, tensor in reference.tensors.items() if name != f"encoder.layer.1.attention.attention.{part}.weight"}
    assert "misshapen 1: blocks.1.attn.qkv.weight [64, 32] instead of [96, 32]" in refusal(fit, reference, reference.save(tmp_path, tensors))


@pytest.mark.parametrize("what", [what for what in OTHERS if what.startswith("dinov3") and not what.endswith("qkvb")])
def test_a_qkv_bias_that_the_teacher_lacks_is_refused_unless_it_is_zero(tmp_path, what):
    reference = build_reference(what)
    tensors = {key: tensor.clone() for key, tensor in reference.tensors.items()}
    (key,) = (key for key in tensors if key.endswith("blocks.1.attn.qkv.bias"))
    tensors[key][5] = 1e-6  # a query's
    assert "unexpected 1: blocks.1.attn.q_bias" in refusal(fit, reference, reference.save(tmp_path, tensors))
    tensors[key][5], tensors[key][40] = 0, 3.0  # a key's: masked away
    assert_close(features(load(reference, reference.save(tmp_path, tensors)), IDS), reference.features(PICTURES, IDS))


def test_transformers_biases_that_the_teacher_lacks_are_refused_unless_they_are_zero(tmp_path):
    reference = build_reference("hf-dinov3")
    unbiased = Reference(**{**vars(reference), "name": "vit_small_patch16_dinov3"})
    assert "unexpected 4: blocks.0.attn." in refusal(fit, unbiased, reference.save(tmp_path, reference.tensors))
    zeroed = {key: torch.zeros_like(t) if key.endswith(("q_proj.bias", "v_proj.bias")) else t for key, t in reference.tensors.items()}
    fit(unbiased, reference.save(tmp_path, zeroed))


@pytest.mark.parametrize(
    "what, format, words",
    [
        ("hf-mae", "timm", "transformers' ViT-MAE with its decoder (format hf): try teacher.format=hf"),
        ("hf-vit", "mae", "transformers' ViT or DINOv2 encoder (format hf): try teacher.format=hf"),
        ("hf-classifier", "timm", "try teacher.format=hf"),
        ("hf-dinov2", "dinov2", "try teacher.format=hf"),
        ("hf-dinov2-registers", "dinov2", "try teacher.format=hf"),
        ("hf-dinov3", "dinov3", "transformers' DINOv3 (format hf): try teacher.format=hf"),
        ("dinov2-registers", "timm", "a published DINOv2 (format dinov2): try teacher.format=dinov2"),
        ("dinov2-giant", "timm", "try teacher.format=dinov2"),
        ("dinov3", "timm", "a published DINOv3 (format dinov3): try teacher.format=dinov3"),
        ("dinov3-gated-qkvb", "dinov2", "try teacher.format=dinov3"),
        ("timm-registers", "dinov2", "try teacher.format=timm"),
        ("dinov2-registers", "hf", "try teacher.format=dinov2"),
        ("dmae_ds", "hf", "an encoder only: has no decoder: try teacher.format=timm"),
        ("mae", "timm", "holds model, expected an entry 'state_dict' or a plain dict of tensors; try teacher.format=mae"),
        ("mae-training", "hf", "try teacher.format=mae"),
        ("timm-pth", "mae", "holds state_dict, epoch, expected an entry 'model' or a plain dict of tensors; try teacher.format=timm"),
        ("dinov2-training", "mae", "holds teacher, expected an entry 'model' or a plain dict of tensors; try teacher.format=dinov2 or dinov3"),
        ("timm", "dmae_ds", "was not written by this project (it names no network); set teacher.format to timm"),
        ("timm", "mea", "teacher.format 'mea' can't be imported"),
    ],
)
def test_a_wrong_format_names_the_right_one(tmp_path, what, format, words):
    reference = build_reference(what)
    assert words in refusal(load if format == "dmae_ds" else fit, reference, reference.save(tmp_path, reference.tensors), format)


def test_a_file_of_another_size_suggests_no_format(tmp_path):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    wide = Reference(**{**vars(reference), "overrides": {**SHAPE, "embed_dim": 48}})
    message = refusal(fit, wide, path)
    assert "cls_token [1, 1, 32] instead of [1, 1, 48]" in message
    assert "an encoder only: has no decoder" in message and "try teacher.format" not in message


@pytest.mark.parametrize(
    "what, kind",
    [
        ("timm", "an encoder only: has no decoder"), ("mae", "a whole MAE, encoder and decoder (format mae)"), ("mae-finetuned", "a classifier (format timm or mae)"),
        ("hf-mae", "transformers' ViT-MAE with its decoder"), ("hf-vit", "transformers' ViT or DINOv2 encoder"), ("hf-classifier", "transformers' ViT or DINOv2 encoder"),
        ("hf-dinov3", "transformers' DINOv3"), ("dinov2-registers", "a published DINOv2"), ("dinov2-training", "a published DINOv2"), ("dinov3", "a published DINOv3"),
    ],
)  # fmt: skip
def test_a_file_is_described_by_its_names(what, kind):
    assert describe_kind(list(build_reference(what).tensors)).startswith(kind)


def test_parts_that_do_not_go_together_are_no_matter_in_a_block_that_stays_in_the_file(tmp_path):
    reference, key = build_reference("hf-vit"), "encoder.layer.{}.attention.attention.query.weight"
    for block in (2, 1):
        tensors = reference.tensors | {key.format(block): torch.ones(32, 16)}
        path = reference.save(tmp_path, tensors)
        if block == 2:
            assert_close(features(load(reference, path), IDS), reference.features(PICTURES, IDS))
        else:
            assert "misshapen 1: blocks.1.attn.qkv.weight [32, 16] + [32, 32] + [32, 32] instead of [96, 32]" in refusal(fit, reference, path)


def test_two_names_for_one_tensor_are_refused(tmp_path):
    reference = build_reference("dinov2")
    path = reference.save(tmp_path, reference.tensors | {"backbone.cls_token": torch.zeros(1, 1, 32)})
    assert "holds cls_token twice as format dinov2: 'cls_token' and 'backbone.cls_token'" in refusal(load, reference, path)


def test_what_stays_in_the_file_is_told_part_by_part(tmp_path):
    dropped = {what: load(build_reference(what), build_reference(what).save(tmp_path, build_reference(what).tensors)).parts.describe_dropped() for what in ("mae", "dinov2")}
    assert dropped["mae"].startswith("blocks 3-3, decoder, norm: ")
    assert dropped["dinov2"].startswith("blocks 3-3, mask_token, norm: ")


def test_a_missing_part_matters_where_a_needed_tensor_is_in_it(tmp_path):
    reference = build_reference("timm")
    parts = {"one.safetensors": ("blocks.0.", "blocks.1.", "cls_token", "pos_embed", "patch_embed"), "two.safetensors": ("blocks.2.", "norm")}
    for part, starts in parts.items():
        as_safetensors(tmp_path, {key: tensor for key, tensor in reference.tensors.items() if key.startswith(starts)}, part)
    weight_map = {key: part for part, starts in parts.items() for key in reference.tensors if key.startswith(starts)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "two.safetensors").unlink()
    assert_close(features(load(reference, tmp_path), IDS), reference.features(PICTURES, IDS))
    as_safetensors(tmp_path, {key: tensor for key, tensor in reference.tensors.items() if key.startswith(parts["two.safetensors"])}, "two.safetensors")
    (tmp_path / "one.safetensors").unlink()
    message = refusal(load, reference, tmp_path)
    assert "missing 28: cls_token, " in message and "1 parts are not here: one.safetensors" in message


# --- our own files, maps of one's own, auto ---


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("vit_small_patch16_224", SHAPE, "holds vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {**SHAPE, "num_heads": 4}, "the recipe's teacher is vit_tiny_patch16_224"),
    ],
)
def test_a_file_of_ours_is_held_against_what_it_says_of_itself(tmp_path, name, overrides, words):
    reference = build_reference("dmae_ds")
    path = reference.save(tmp_path, reference.tensors)
    other = Reference(**{**vars(reference), "name": name, "overrides": overrides})
    assert words in refusal(load, other, path)
    load(other, path, "timm")  # the shapes fit: only the metadata tell


@pytest.fixture
def my_lab(tmp_path, monkeypatch) -> None:
    """A module of the user's, with a map as a function and as a Format."""
    (tmp_path / "my_lab_maps.py").write_text(
        "from dmae_ds.teacher.formats import Format\n"
        "def to_timm(name):\n"
        "    return None if name.startswith('probe.') else name.removeprefix('encoder.')\n"
        "nested = Format('of my lab', to_timm, entries=('net',))\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_lab_maps", None)


def test_a_map_of_the_user_s_own_is_imported(tmp_path, my_lab):
    reference = build_reference("timm")
    tensors = {f"encoder.{key}": tensor for key, tensor in reference.tensors.items()} | {"probe.weight": torch.ones(3)}
    expected = reference.features(PICTURES, IDS)
    assert_close(features(load(reference, as_pth()(tmp_path, tensors), "my_lab_maps:to_timm"), IDS), expected)
    assert_close(features(load(reference, as_pth("net", epoch=3)(tmp_path, tensors), "my_lab_maps:nested"), IDS), expected)


@pytest.mark.parametrize("format, words", [("my_lab_maps:absent", "can't be imported"), ("my_lab_typo:to_timm", "can't be imported"), ("my_lab_maps:number", "is a int")])
def test_a_map_that_is_none_is_refused(tmp_path, my_lab, format, words):
    reference = build_reference("timm")
    assert words in refusal(load, reference, reference.save(tmp_path, reference.tensors), format)


def choose(reference: Reference, path: Path):
    vit = meta_teacher(reference.name, reference.overrides, TAP)
    return choose_format(path, fits(vit.state_dict(), depth=TAP, may_resize=True))


@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_auto_takes_the_one_map_that_covers(tmp_path, what):
    reference = build_reference(what)
    path = reference.save(tmp_path, reference.tensors)
    # Maps that name the same tensors are one, under the first one's name: a file of ours has timm's names.
    assert choose(reference, path).format == {"dmae_ds": "timm"}.get(what, reference.format)


def test_auto_refuses_what_no_map_covers_and_what_two_do(tmp_path, monkeypatch):
    reference = build_reference("timm")
    path = reference.save(tmp_path, reference.tensors)
    swapped = Format("norms the other way round", lambda name: name.replace("norm1", "norm0").replace("norm2", "norm1").replace("norm0", "norm2"))
    with monkeypatch.context() as patch:
        patch.setitem(FORMATS, "swapped", swapped)
        assert "fits the formats timm, swapped, with different tensors; set teacher.format" in refusal(choose, reference, path)
    assert choose(reference, path).format == "timm"
    spoilt = as_safetensors(tmp_path, changed(reference, tmp_path, "removed"), "spoilt.safetensors")
    assert "fits the teacher under no known format" in refusal(choose, reference, spoilt)
    assert "is not a file" in refusal(choose, reference, tmp_path / "absent.safetensors")


# --- the hub, from a cache ---


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache folder of huggingface_hub, with the network switched off."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into_cache(hub: Path, owner: str, name: str, files: dict[str, Path | str]) -> Path:
    sha = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{owner}--{name}"
    snapshot = repository / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    for file, content in files.items():
        (snapshot / file).write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())
    return snapshot


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_a_hub_id_is_served_from_the_cache(tmp_path, hub, kind):
    reference = build_reference("hf-dinov2-registers")
    saved = tmp_path / "saved"
    saved.mkdir()
    if kind == "bin":
        torch.save(reference.tensors, saved / "pytorch_model.bin")
    else:
        reference.model.save_pretrained(saved, **({"max_shard_size": "40KB"} if kind == "sharded" else {}))
    snapshot = put_into_cache(hub, "facebook", "tiny-dino", {file.name: file for file in saved.iterdir()})
    config = TeacherConfig(name=reference.name, weights="facebook/tiny-dino", format="hf")
    path = locate(config)
    assert path.parent == snapshot
    assert_close(features(load(reference, path), IDS), reference.features(PICTURES, IDS))


@pytest.mark.parametrize(
    "files, words",
    [
        (None, "is no file here, and owner/name could not be fetched from the hub (Cannot reach"),
        ({"config.json": "{}"}, "could not be fetched from the hub"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "absent.safetensors"}}'}, "could not be fetched from the hub"),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "../../evil.safetensors"}}'}, "names the part '../../evil.safetensors'"),
        ({"model.safetensors.index.json": "<html>"}, "is not an index of parts"),
    ],
)
def test_a_hub_id_that_can_not_be_served_is_one_line(hub, files, words):
    if files is not None:
        put_into_cache(hub, "owner", "name", files)
    assert words in refusal(locate, TeacherConfig(name="vit_tiny_patch16_224", weights="owner/name", format="hf"))


def test_a_path_is_no_hub_id(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert locate(TeacherConfig(name="vit_tiny_patch16_224", weights="owner/name")) == Path("owner/name")
    assert locate(TeacherConfig(name="vit_tiny_patch16_224", weights="weights/absent.pth")) == Path("weights/absent.pth")


def test_pretrained_weights_are_those_of_timm_s_tag(hub):
    snapshot = put_into_cache(hub, "timm", "vit_base_patch16_224.mae", {"model.safetensors": "x"})
    assert locate(TeacherConfig(name="vit_base_patch16_224.mae", pretrained=True)) == snapshot / "model.safetensors"
    assert "has no weights on the hub that timm knows" in refusal(locate, TeacherConfig(name="vit_base_patch16_224.mine", pretrained=True))
