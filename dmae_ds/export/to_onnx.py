"""`dmae-ds export --to onnx`: model.onnx, pixels [N, 3, H, W] -> tokens or logits, for any N."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dmae_ds.export.source import STUDENTS, Inputs, Source
from dmae_ds.models.vit import build_timm_vit

FILE = "model.onnx"
MAX_ONE_FILE = 1_500_000_000  # bytes; larger weights go into model.onnx.data, as protobuf is limited to 2 GB
# Python for the image's feature, by what an objective is judged by.
POOLED = {"mean": "tokens[:, {prefix}:].mean(axis=1)", "cls": "tokens[:, 0]"}
OPSET = 18  # the first one that torch's exporter writes without conversion


class _Network(nn.Module):
    """timm's network, [N, 3, H, W] -> tokens or logits, for any N; ours uses `len`, which would fix N."""

    def __init__(self, source: Source):
        super().__init__()
        self.classifies = source.what not in STUDENTS
        self.vit = source.model if self.classifies else build_timm_vit(source.name, source.overrides)
        self.vit.load_state_dict(source.tensors, strict=True, assign=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values) if self.classifies else self.vit.forward_features(pixel_values)


def _output(source: Source) -> str:
    return "tokens" if source.what in STUDENTS else "logits"


def write_onnx(source: Source, folder: Path) -> None:
    """Write model.onnx with torch's exporter."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    size = sum(tensor.numel() * 4 for tensor in source.tensors.values())
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _Network(source).eval(),
            (source.inputs().pixels,),
            dynamo=True,
            dynamic_shapes={"pixel_values": {0: batch}},
            input_names=["pixel_values"],
            output_names=[_output(source)],
            opset_version=OPSET,
            verbose=False,
        )
        program.model.metadata_props.update(_facts(source))
        program.save(folder / FILE, external_data=size > MAX_ONE_FILE)


def _facts(source: Source) -> dict[str, str]:
    """Strings in the file's metadata: how pixels are prepared, and which token is the image's feature."""
    facts = {
        "img_size": str(source.img_size),
        "mean": json.dumps(list(source.pixels.mean)),
        "std": json.dumps(list(source.pixels.std)),
        "crop_pct": str(source.pixels.crop_pct),
    }
    if source.what in STUDENTS:
        facts["pool"] = source.config.objective.judged_by
    return facts


def run_onnx(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """Return what onnxruntime computes on the CPU, in a batch of one and a batch of the rest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    outputs = [
        session.run(None, {"pixel_values": pixels.numpy()})[0]
        for pixels in (inputs.pixels[:1], inputs.pixels[1:])
    ]
    return {_output(source): torch.cat([torch.from_numpy(output) for output in outputs])}


def explain_onnx(source: Source, name: str) -> str:
    """Return Python that runs the file."""
    shape = f"[N, {source.num_prefix + source.num_patches}, {source.vit.embed_dim}]"
    size, pool = source.img_size, ""
    if source.what == "classifier":
        shape = f"[N, {source.keys['num_classes']}]"
    elif source.what == "segmenter":
        shape = f"[N, {source.keys['num_classes']}, {size}, {size}]"
        pool = "\nclasses = logits.argmax(axis=1)"
    colours = "RGB" if source.channels == 3 else "as stored"
    if source.what in STUDENTS:
        feature = POOLED[source.config.objective.judged_by].format(prefix=source.num_prefix)
        pool = f"\nfeature = {feature}  # [N, {source.vit.embed_dim}]"
    image = f"[N, {size}, {size}, {source.channels}], 0 to 255, {colours}"
    return f"""import numpy as np, onnxruntime
# image: {image}, short side to {size} / {source.pixels.crop_pct:g}, centre crop
mean, std = np.float32({list(source.pixels.mean)}), np.float32({list(source.pixels.std)})
pixels = ((np.float32(image) / 255 - mean) / std).transpose(0, 3, 1, 2)
session = onnxruntime.InferenceSession("{name}/{FILE}")
({_output(source)},) = session.run(None, {{"pixel_values": pixels}})  # {shape}{pool}"""
