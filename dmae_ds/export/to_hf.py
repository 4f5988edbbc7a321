"""`dmae-ds export --to hf`: folders that transformers loads.

`ViTModel` is the encoder, `ViTMAEForPreTraining` has the pixel decoder too, `ViTForImageClassification` is a
classifier; encoders of DINOv2's and DINOv3's kind have classes of their own (hf_dino.py). Tensors are written
under the names of the published files (google/vit-base-patch16-224, facebook/vit-mae-base), which every
version of transformers reads: version 5 renames them as it loads. `qkv` is cut into query, key and value.
MAE's positional embeddings are kept. Its decoder's tokens are in the order of the grid there and in the order
of the mask here, on which attention does not depend. The images' processor is CLIP's (short side, central
crop), because ViT's changes the aspect ratio. In transformers 5 it lays transparency on white as training
does; the card's Python does so for every version.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.export.hf_config import shared_config
from dmae_ds.export.hf_dino import dino_config, dino_tensors, find_layout
from dmae_ds.export.source import OPEN_IMAGE, Inputs, Source
from dmae_ds.output.durable import write_tensors

BICUBIC = 3  # PIL's number
CLASSES = {"encoder": "ViTModel", "mae": "ViTMAEForPreTraining", "classifier": "ViTForImageClassification"}

_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_AROUND = {
    "decoder.embed.weight": "decoder.decoder_embed.weight",
    "decoder.embed.bias": "decoder.decoder_embed.bias",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.pos_embed": "decoder.decoder_pos_embed",
    "decoder.norm.weight": "decoder.decoder_norm.weight",
    "decoder.norm.bias": "decoder.decoder_norm.bias",
    "decoder.pred.weight": "decoder.decoder_pred.weight",
    "decoder.pred.bias": "decoder.decoder_pred.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}


def to_transformers(tensors: dict[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors under the names of transformers' published files, with qkv cut in three.

    prefix: put before the encoder's names ("vit." where it is a part of a larger model)
    Raises UserError for a tensor that transformers' ViT does not have, such as a layer scale.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        targets = _targets(name, prefix)
        if not targets:
            raise UserError(
                f"transformers' ViT has no tensor for '{name}'; export --to timm, safetensors or onnx"
            )
        # cloned, because tensors that share their storage can't be saved
        chunks = tensor.chunk(len(targets))
        renamed |= {target: chunk.clone().contiguous() for target, chunk in zip(targets, chunks, strict=True)}
    return renamed


def _targets(name: str, prefix: str) -> list[str]:
    """Return transformers' names for a tensor of ours: three for qkv, none where it has no such tensor."""
    block = re.fullmatch(r"(decoder\.)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is None:
        if name in _ENCODER:
            return [prefix + _ENCODER[name]]
        return [_AROUND[name]] if name in _AROUND else []
    of_decoder, number, layer, kind = block.groups()
    stem = f"decoder.decoder_layers.{number}" if of_decoder else f"{prefix}encoder.layer.{number}"
    if layer == "attn.qkv":
        return [f"{stem}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
    return [f"{stem}.{_BLOCK[layer]}.{kind}"] if layer in _BLOCK else []


def _check_positions(source: Source) -> None:
    """Raise UserError for a ViT without CLS, or whose CLS has no position."""
    positions, num_positions = source.tensors.get("pos_embed"), 1 + source.grid[0] * source.grid[1]
    if "cls_token" not in source.tensors or positions is None or positions.shape[1] != num_positions:
        raise UserError(
            f"transformers' ViT has CLS and a position for it, '{source.name}' has not; export --to timm, "
            "safetensors or onnx"
        )


def write_hf(source: Source, folder: Path) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json."""
    if source.keys.get("global_pool", "token") != "token":
        raise UserError(
            "transformers' ViT classifies CLS, this classifier the mean of the patches; "
            "export --to timm, safetensors or onnx, or fine-tune with pool=cls"
        )
    layout = find_layout(source) if source.what == "encoder" else None
    if layout is not None:
        tensors, config = dino_tensors(source, layout), dino_config(source, layout)
    else:
        tensors = to_transformers(source.tensors, prefix="" if source.what == "encoder" else "vit.")
        config = _config(source)
        _check_positions(source)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    pixels, size = source.pixels, source.img_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / pixels.crop_pct)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    for name, content in (("config", config), ("preprocessor_config", preprocessor)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _config(source: Source) -> dict:
    block = source.vit.blocks[0]
    config = shared_config(source, "ViT") | {
        "architectures": [CLASSES[source.what]],
        "model_type": "vit_mae" if source.what == "mae" else "vit",
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if source.what == "classifier":
        names = source.classes or [f"LABEL_{number}" for number in range(source.keys["num_classes"])]
        config |= {
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
        }
    if source.what == "mae":
        decoder = source.model.decoder
        config |= {
            "decoder_hidden_size": decoder.embed.out_features,
            "decoder_num_hidden_layers": len(decoder.blocks),
            "decoder_num_attention_heads": decoder.blocks[0].attn.num_heads,
            "decoder_intermediate_size": decoder.blocks[0].mlp.fc1.out_features,
            "norm_pix_loss": source.model.norm_pix,
            "mask_ratio": truncating_ratio(
                source.model.mask_ratio, source.num_patches, source.model.num_visible
            ),
        }
    return config


def truncating_ratio(mask_ratio: float, num_patches: int, num_visible: int) -> float:
    """Return a mask ratio that leaves this student's number of visible patches as transformers counts them.

    transformers keeps int(L * (1 - ratio)); the recipe's ratio is returned where that gives the same number.
    """
    if int(num_patches * (1 - mask_ratio)) == num_visible:
        return mask_ratio
    return 1 - (num_visible + 0.5) / num_patches


def run_hf(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """Return what transformers' network computes; the folder must hold every tensor of it, and no other."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    class_name, options = _class_of(source)
    model, info = getattr(transformers, class_name).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    transformers.AutoImageProcessor.from_pretrained(folder)
    model = model.float().eval()
    if source.what == "encoder":
        return {"tokens": model(inputs.pixels).last_hidden_state}
    if source.what == "classifier":
        return {"logits": model(inputs.pixels).logits}
    output, ids_masked = model(inputs.pixels, noise=inputs.noise), source.ids_masked(inputs.noise)
    num, num_masked = ids_masked.shape
    assert torch.equal(output.mask.sum(dim=1), torch.full((num,), float(num_masked)))
    return {"pixels": output.logits[torch.arange(num)[:, None], ids_masked], "loss": output.loss}


def _class_of(source: Source) -> tuple[str, dict]:
    """The class that loads the folder, and the arguments with which it does."""
    layout = find_layout(source) if source.what == "encoder" else None
    num_positions = 1 + source.grid[0] * source.grid[1]
    positions = source.tensors.get("pos_embed")
    if layout is None and (
        "cls_token" not in source.tensors or positions is None or positions.shape[1] != num_positions
    ):
        raise UserError(
            f"transformers' ViT has CLS and a position for it, '{source.name}' has not; export --to timm, "
            "safetensors or onnx"
        )
    if layout is not None:
        return layout.class_name, {}
    return CLASSES[source.what], {"add_pooling_layer": False} if source.what == "encoder" else {}


def explain_hf(source: Source, name: str) -> str:
    """Return Python that loads the folder."""
    class_name, options = _class_of(source)
    option = "".join(f", {key}={value}" for key, value in options.items())
    registers = getattr(source.vit, "num_prefix", 1) - 1
    order = f"CLS first, {registers} registers, patches" if registers > 0 else "CLS first"
    answer = {
        "encoder": f"tokens = model(**inputs).last_hidden_state  # {order}",
        "classifier": "logits = model(**inputs).logits",
        "mae": "out = model(**inputs)  # out.loss, out.logits [N, L, P * P * 3], out.mask",
    }[source.what]
    return f"""{OPEN_IMAGE}
from transformers import AutoImageProcessor, {class_name}
processor = AutoImageProcessor.from_pretrained("{name}")
model = {class_name}.from_pretrained("{name}"{option}).eval()
inputs = processor(images=image, return_tensors="pt")
{answer}"""
