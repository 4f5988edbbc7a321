"""The whole segmenter as ONNX; the run's own export and its backbone stay as they were."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.dense.segmenter_file import load_segmenter
from dmae_ds.export.export import export
from tests.dense.conftest import segment
from tests.messages import refused


@pytest.mark.parametrize(
    "recipe", ["upernet_ade20k", pytest.param("linear_segment_ade20k", marks=pytest.mark.slow)]
)
def test_onnxruntime_computes_the_segmenter_s_logits(scene_run, recipe):
    before = (scene_run / "student.safetensors").read_bytes()
    segment(scene_run, "optim.length=2", recipe=recipe)
    out, card = export(scene_run / recipe, to="onnx", what="segmenter")
    assert out == scene_run / recipe / "export" / "onnx" and card["check"]["largest"] < 1e-4
    segmenter, facts = load_segmenter(scene_run / recipe / "last.safetensors", label="file")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        expected = segmenter(pixels)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    resized = [node for node in onnx.load(out / "model.onnx").graph.node if node.op_type == "Resize"]
    modes = {attribute.s for node in resized for attribute in node.attribute if attribute.name == "mode"}
    assert modes == {b"linear"}  # of logits; positional embeddings stay as they are
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == list(facts.mean) and "pool" not in metadata
    text = (out / "README.md").read_text()
    assert "image-segmentation" in text and "mIoU" in text and "[N, 5, 16, 16]" in text
    assert (scene_run / "student.safetensors").read_bytes() == before


def test_what_can_not_be_exported_is_refused(scene_run):
    segment(scene_run, "optim.length=2")
    folder = scene_run / "upernet_ade20k"
    with refused("--to timm", "segmenter", "--to onnx"):
        export(folder, to="timm", what="segmenter")
    with refused(scene_run / "last.safetensors", "eval segment", folder):
        export(scene_run, to="onnx", what="segmenter")
    out, _ = export(scene_run, to="safetensors")  # the run's student, as without a segmenter
    exported, student = load_file(out / "student.safetensors"), load_file(scene_run / "student.safetensors")
    assert exported.keys() == student.keys()
    assert all(torch.equal(exported[name], student[name]) for name in student)
