"""--to onnx: model.onnx, pixels [batch, 3, H, W] -> tokens or logits, any batch size; run back by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dmae_ds.export.source import Inputs, Source
from dmae_ds.models.vit import build_timm_vit

FILE = "model.onnx"
MAX_ONE_FILE = 1_500_000_000  # bytes; protobuf ends at 2 GB, and larger weights go into model.onnx.data
OPSET = 18  # the first with which torch's exporter needs no conversion


class _Network(nn.Module):
    """timm's own network, which leaves the batch's size free where ours counts with `len`: [N, 3, H, W] -> tokens or logits."""

    def __init__(self, source: Source):
        super().__init__()
        self.classifies = source.what == "classifier"
        self.vit = source.model if self.classifies else build_timm_vit(source.name, source.overrides)
        self.vit.load_state_dict(source.tensors, strict=True, assign=True)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values) if self.classifies else self.vit.forward_features(pixel_values)


def _output(source: Source) -> str:
    return "logits" if source.what == "classifier" else "tokens"


def write_onnx(source: Source, folder: Path) -> None:
    """model.onnx, by torch's exporter."""
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
        program.save(folder / FILE, external_data=size > MAX_ONE_FILE)


def ask_onnx(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """What onnxruntime answers on the CPU, in batches of one and of the rest: the batch's size must be free."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    parts = [
        session.run(None, {"pixel_values": part.numpy()})[0]
        for part in (inputs.pixels[:1], inputs.pixels[1:])
    ]
    return {_output(source): torch.cat([torch.from_numpy(part) for part in parts])}


def explain_onnx(source: Source, name: str) -> str:
    """Python that runs it."""
    shape = (
        f"[N, {source.keys['num_classes']}]"
        if source.what == "classifier"
        else f"[N, {1 + source.num_patches}, {source.vit.embed_dim}]"
    )
    return f"""import onnxruntime
session = onnxruntime.InferenceSession("{name}/{FILE}")
({_output(source)},) = session.run(None, {{"pixel_values": pixels}})  # float32 [N, 3, {source.img_size}, {source.img_size}] -> {shape}"""
