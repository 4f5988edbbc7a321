"""Each export, read by its own library alone, gives the outputs of the trained network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dmae_ds.config.load import read_saved_config
from dmae_ds.data.decode import decode_bytes
from dmae_ds.data.transforms import eval_view
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.export import export as exporter
from dmae_ds.export import to_hf
from dmae_ds.export.export import LIMIT, TARGETS, compare, export
from dmae_ds.export.source import OPEN_IMAGE, open_source
from dmae_ds.export.to_hf import truncating_ratio
from dmae_ds.export.to_timm import reads_folders
from dmae_ds.models.masking import num_visible
from tests.export.conftest import STUDENT, change, disturb, make_classifier, make_run
from tests.messages import refused

ALONE = Path(__file__).with_name("alone.py")


def expect(run, what, file):
    """Write inputs that the exporter did not use, and the trained network's outputs, for another process."""
    source = open_source(run, what)
    inputs = source.inputs(seed=7)
    outputs = {
        ("pixels_reconstructed" if name == "pixels" else name): tensor.numpy()
        for name, tensor in source.outputs(inputs).items()
    }
    masked = {"ids_masked": source.ids_masked(inputs.noise).numpy()} if what == "mae" else {}
    np.savez(file, pixels=inputs.pixels.numpy(), noise=inputs.noise.numpy(), **outputs, **masked)
    return file


def read_alone(library, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-I", ALONE, library, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


WRONG = {"timm": "blocks.2.attn.qkv.bias", "transformers": "encoder.layer.1.attention.attention.key.weight"}


EXPORTS = {
    "timm": [
        ("timm", "encoder"),
        ("safetensors", "encoder"),
        ("timm", "classifier"),
        ("safetensors", "classifier"),
    ],
    "transformers": [("hf", "encoder"), ("hf", "mae"), ("hf", "classifier")],
    "onnxruntime": [("onnx", "encoder")],
}
SLOW = {"onnxruntime": [("onnx", "classifier")]}
ELSEWHERE = {("onnx", "segmenter"), ("original", "encoder")}  # tests/dense/test_segmenter_export.py


def needs_folders(exports):
    if any(to == "timm" for to, _ in exports) and not reads_folders(timm.__version__):
        pytest.skip(f"timm {timm.__version__} reads no safetensors out of a folder")


def run_the_code_on_the_card(out: Path, run: Path) -> None:
    """The file says how pixels are prepared, and the card's Python does that and pools the right token."""
    import onnxruntime

    data = read_saved_config(run).data
    facts = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == list(data.mean) and json.loads(facts["std"]) == list(data.std)
    assert facts["img_size"] == "24"
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    names = {"image": image}
    code = (out / "README.md").read_text().split("```")[1].removeprefix("python")
    exec(code.replace(f'"{out.name}/', f'"{out}/'), names)
    expected = (image / 255 - data.mean) / data.std
    assert np.allclose(names["pixels"], expected.transpose(0, 3, 1, 2), atol=1e-5)
    if "pool" in facts:
        tokens = names["tokens"]
        pooled = {"mean": tokens[:, 1:].mean(axis=1), "cls": tokens[:, 0]}[facts["pool"]]
        assert np.array_equal(names["feature"], pooled)


@pytest.mark.parametrize(
    "library, exports",
    [*EXPORTS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items())],
)
def test_the_other_library_alone_gives_the_trained_network_s_outputs(shared_run, tmp_path, library, exports):
    needs_folders(exports)
    classifier = make_classifier(tmp_path / "finetune", pool="cls" if library == "transformers" else "mean")
    arguments = []
    for to, what in exports:
        folder = classifier if what == "classifier" else shared_run
        out, card = export(folder, to=to, what=what, out=tmp_path / f"{to}-{what}")
        assert card["check"]["largest"] <= LIMIT and card["step"] == 1234
        arguments += [out, expect(folder, what, tmp_path / f"{what}.npz")]
        if library == "onnxruntime":
            run_the_code_on_the_card(out, shared_run)
    if library in WRONG:  # and one wrong weight shows: the first folder again, one tensor a little off
        wrong = shutil.copytree(arguments[0], tmp_path / "wrong")
        disturb(wrong / "model.safetensors", WRONG[library])
        arguments += [wrong, arguments[1]]
    differences = read_alone(library, *arguments, cwd=tmp_path)
    assert len(differences) == len(arguments) // 2
    assert all(difference < LIMIT for difference in differences[: len(exports)])
    assert library not in WRONG or differences[-1] > 100 * LIMIT


def test_every_layout_of_every_part_is_tried():
    tried = {export for exports in (*EXPORTS.values(), *SLOW.values()) for export in exports}
    assert tried | ELSEWHERE == {(to, what) for to, target in TARGETS.items() for what in target.parts}


def test_an_export_with_other_outputs_is_an_error_and_leaves_nothing(run, tmp_path, monkeypatch):
    right = to_hf.to_transformers

    def swapped(tensors, **options):
        renamed = right(tensors, **options)
        query, key = (f"encoder.layer.0.attention.attention.{part}.bias" for part in ("query", "key"))
        return {**renamed, query: renamed[key], key: renamed[query]}

    monkeypatch.setattr(to_hf, "to_transformers", swapped)
    with refused("hf", run, "tokens", error=RunFailed):
        export(run, to="hf", out=tmp_path / "out" / "hf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("wrong", ["pixels", "loss"])
def test_one_of_two_outputs_that_differs_is_an_error(run, tmp_path, monkeypatch, wrong):
    found = {"pixels": 0.0, "loss": 0.0, wrong: 1.0}
    monkeypatch.setattr("dmae_ds.export.export.compare", lambda *_: found)
    with refused("hf", run, f"{wrong} by 1", error=RunFailed):
        export(run, to="hf", what="mae", out=tmp_path / "hf")


def test_not_a_number_is_a_difference(run, tmp_path):
    change(run / "student.safetensors", "norm.bias", by=float("nan"))
    with refused("tokens", "nan", error=RunFailed):
        export(run, to="safetensors", out=tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_limit_is_raised_by_rounding_alone(run, shared_run, tmp_path):
    assert export(shared_run, to="safetensors", out=tmp_path / "a")[1]["check"]["limits"] == {"tokens": LIMIT}
    change(run / "student.safetensors", "norm.bias", by=3000.0)  # one step of float32 is 2.4e-4 there
    _, card = export(run, to="safetensors", out=tmp_path / "b")
    assert 1e-4 < card["check"]["limits"]["tokens"] < 1e-2
    changed = open_source(run, "encoder")
    assert card["check"]["limits"]["tokens"] == 4 * changed.rounding(changed.inputs())["tokens"]
    source = open_source(shared_run, "encoder")
    before = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    assert 0 < source.rounding(source.inputs())["tokens"] < LIMIT
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == torch.float32
        for name, tensor in source.model.state_dict().items()
    )


def test_the_difference_is_the_largest():
    right = torch.zeros(2, 3)
    assert compare({"a": right + 1e-3, "b": right}, {"a": right, "b": right}) == {
        "a": pytest.approx(1e-3),
        "b": 0,
    }
    with pytest.raises(AssertionError):
        compare({"a": right[:1]}, {"a": right})


@pytest.mark.parametrize("mask_ratio", [0.05, 0.25, 0.5, 0.6, 0.75, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("side", [4, 8, 14, 16])
def test_transformers_masks_as_many_patches_as_we_do(side, mask_ratio):
    for patch_count in ("round", "int"):
        try:
            kept = num_visible(side**2, mask_ratio, patch_count)
        except UserError:
            continue
        ratio = truncating_ratio(mask_ratio, side**2, kept)
        assert int(side**2 * (1 - ratio)) == kept
        assert patch_count == "round" or ratio == mask_ratio


def test_transformers_prepares_an_image_as_our_evaluation_does(shared_run, tmp_path):
    from transformers import AutoImageProcessor

    out, _ = export(shared_run, to="hf", out=tmp_path / "hf")
    squares = np.random.default_rng(0).integers(0, 256, (9, 15, 3))
    image = squares.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8)
    processor = AutoImageProcessor.from_pretrained(out)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0].numpy()
    ours = eval_view(image, img_size=24, crop_pct=0.8)
    mean, std = (np.array(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    assert theirs.shape == ours.shape and np.abs((theirs * std + mean) * 255 - ours).mean() < 1.5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white_for_the_processor_and_the_card_s_python(
    shared_run, tmp_path, mode, monkeypatch
):
    import transformers

    out, _ = export(shared_run, to="hf", out=tmp_path / "hf")
    image = Image.new(mode, (48, 30))  # nothing but transparency, above black
    image.save(tmp_path / "image.png", **({"transparency": bytes([0])} if mode == "P" else {}))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(OPEN_IMAGE, names)
    ours = decode_bytes((tmp_path / "image.png").read_bytes())
    assert np.array_equal(np.asarray(names["image"]), ours) and ours.min() == 255
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    images = [names["image"]]
    if int(transformers.__version__.split(".")[0]) >= 5:  # its processor knows the rule itself
        images.append(Image.open(tmp_path / "image.png"))
    for given in images:
        theirs = processor(given, return_tensors="pt")["pixel_values"][0].numpy()
        mean, std = (np.array(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
        assert np.abs((theirs * std + mean) - 1).max() < 1e-5


def test_16_bit_grey_is_scaled_by_the_card_s_python(tmp_path, monkeypatch):
    grey = np.array([[0, 255, 256, 2000], [40_000, 60_000, 65_279, 65_535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(OPEN_IMAGE, names)
    ours = decode_bytes((tmp_path / "image.png").read_bytes())
    assert np.array_equal(np.asarray(names["image"]), ours)
    assert ours[..., 0].tolist() == [[0, 0, 1, 7], [156, 234, 254, 255]]


def build_network(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **{**STUDENT_SHAPE, **kwargs})


STUDENT_SHAPE = {key: value for key, value in STUDENT.items() if key != "name"}


def test_students_of_other_kinds_are_exported_where_they_fit_and_refused_elsewhere(tmp_path):
    clip = make_run(tmp_path / "clip", student={**STUDENT, "name": "vit_base_patch16_clip_224"})
    assert export(clip, to="safetensors")[0] == clip / "export" / "safetensors"
    with refused("norm_pre", "--to timm, safetensors or onnx"):
        export(clip, to="hf")
    mean = make_run(tmp_path / "mean", student={**STUDENT, "name": "vit_base_patch16_gap_224"})
    with refused("CLS", "vit_base_patch16_gap_224", "--to timm, safetensors or onnx"):
        export(mean, to="hf")
    own = make_run(tmp_path / "own", student={"name": f"{__name__}:build_network"})
    assert export(own, to="hf", what="mae")[0] == own / "export" / "hf-mae"
    with refused("student.name", build_network.__module__, "onnx or hf"):
        export(own, to="safetensors", out=tmp_path / "no")
    assert [path.name for path in (own / "export").iterdir()] == ["hf-mae"] and [
        path.name for path in (clip / "export").iterdir()
    ] == ["safetensors"]


def test_mistakes_are_refused_in_one_line(run, tmp_path, monkeypatch):
    def expect_refusal(*words, **options):
        with refused(*words):
            export(**{"run": run, "to": "safetensors", **options})

    expect_refusal("--to safetensors", "mae", "encoder or classifier", "--to hf", what="mae")
    expect_refusal(tmp_path, "config.yaml", run=tmp_path)
    classifier = make_classifier(run / "finetune_mae", pool="mean")
    expect_refusal(classifier, "--what classifier", run=classifier)
    (tmp_path / "file").touch()
    expect_refusal("file", "cannot be written", "--out", out=tmp_path / "file" / "export")
    expect_refusal(run / "last.safetensors", "dmae-ds eval finetune", classifier, what="classifier")
    expect_refusal("timm, safetensors or onnx", "pool=cls", run=classifier, what="classifier", to="hf")
    (tmp_path / "there").mkdir()
    expect_refusal(tmp_path / "there", "--out", out=tmp_path / "there")
    monkeypatch.setattr(exporter, "find_spec", lambda name: None)
    expect_refusal("--to hf", "transformers", "pip install 'dmae-ds[export]'", to="hf")
    expect_refusal("--to onnx", "onnx, onnxscript, onnxruntime", "dmae-ds[export]", to="onnx")
    monkeypatch.undo()
    (run / "decoder.safetensors").write_bytes(b"half")
    expect_refusal(run / "decoder.safetensors", "safetensors", to="hf", what="mae")
    change(run / "student.safetensors", "norm.bias", by=torch.zeros(2, 1))
    expect_refusal(run, "config.yaml")
    (run / "student.safetensors").unlink()
    expect_refusal(run / "student.safetensors", "checkpoint.every_steps")
    assert not (run / "export").exists() and not list((run / "finetune_mae" / "export").iterdir())


def test_an_old_timm_is_refused_before_anything_is_written(run, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.25")
    with refused("1.0.25", "timm>=1.0.26", "--to safetensors"):
        export(run, to="timm")
    assert not list((run / "export").iterdir())
    assert not reads_folders("0.9.16")
    assert all(reads_folders(version) for version in ("1.0.26.dev0", "1.0.31", "2.0.0"))


def test_what_a_killed_export_left_is_no_obstacle(run):
    (run / "export" / "safetensors.tmp" / "half").mkdir(parents=True)
    out, _ = export(run, to="safetensors")
    assert {path.name for path in out.iterdir()} == {
        "student.safetensors",
        "card.json",
        "README.md",
    } and not out.with_name("safetensors.tmp").exists()
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
