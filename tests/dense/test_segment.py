"""`dmae-ds eval segment` in this process: what it writes, resumes, distils and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from dmae_ds.config.load import read_saved_config
from dmae_ds.dense import loop
from dmae_ds.dense import segment as command
from dmae_ds.dense.predict import Predictor
from dmae_ds.dense.segment_task import SegmentTask, logit_map_loss, map_loss
from dmae_ds.dense.segmenter_file import load_segmenter
from dmae_ds.errors import RunFailed
from dmae_ds.evaluate.results import read_results
from dmae_ds.models.patches import Normalize
from tests.dense import float64
from tests.dense.conftest import assert_same_outcome, rows, segment
from tests.evaluate.conftest import STEP
from tests.messages import refused


def test_it_trains_and_leaves_files_that_load(scene_run, capsys):
    result = segment(scene_run, "optim.length=7", "optim.micro_batch=2")
    out = scene_run / "upernet_ade20k"
    assert result["metric"] == "segment" and 0 <= result["scores"]["miou"] <= 100
    assert read_results(scene_run) == [{**result, "when": read_results(scene_run)[0]["when"]}]
    expected = {"step": STEP, "num_train": 24, "num_val": 8, "labels": "all", "world_size": 1}
    assert {name: result[name] for name in expected} == expected
    assert f"{result['scores']['miou']:.1f}%" in capsys.readouterr().out
    table = rows(out)
    assert [row["step"] for row in table] == [2, 3, 4, 6, 7]  # saved every 2, scored every 3, and the end
    assert [row["step"] for row in table if "miou" in row] == [3, 6, 7]
    assert all(row["loss"] == pytest.approx(row["map"] + 0.4 * row["auxiliary"]) for row in table)
    segmenter, facts = load_segmenter(out / "last.safetensors", label="file")
    assert len(facts.classes) == 5 and facts.window == 16 and facts.stride == 10 and facts.short_side == 24
    before = load_file(scene_run / "student.safetensors")["blocks.0.mlp.fc1.weight"]
    assert not torch.equal(segmenter.backbone.blocks[0].mlp.fc1.weight, before)
    assert not list(out.glob("*.tmp"))


# Writes at steps 2, 4: metrics, resume; at 3, 6, where the score is new: best, last, metrics, resume.
@pytest.mark.parametrize("fatal", [5, 8])
def test_killed_at_a_write_and_resumed_it_ends_bit_for_bit_the_same(scene_run, tmp_path, monkeypatch, fatal):
    """The disk does not change between writes, so a kill between two of them equals a kill at the second."""
    segment(scene_run, f"run.dir={tmp_path / 'whole'}")
    count, out = 0, tmp_path / "killed"

    def dying(write):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
            return write(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in ((loop, "write_metrics"), (loop, "save_resume"), (command, "save_segmenter")):
            patch.setattr(module, name, dying(getattr(module, name)))
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(KeyboardInterrupt):
            segment(scene_run, f"run.dir={out}")
    AcceleratorState._reset_state(reset_partial_state=True)
    segment(scene_run, f"run.dir={out}", resume="auto")
    assert_same_outcome(tmp_path / "whole", out)
    before = (out / "last.safetensors").stat().st_mtime_ns
    AcceleratorState._reset_state(reset_partial_state=True)
    segment(scene_run, f"run.dir={out}", resume="auto")  # finished: nothing is trained or written again
    assert (out / "last.safetensors").stat().st_mtime_ns == before


def test_the_best_file_is_of_the_best_score_and_the_result_of_the_last(scene_run, monkeypatch):
    invented = iter([{"miou": 20.0}, {"miou": 30.0}, {"miou": 25.0}])
    scores = {"mean_accuracy": 1.0, "pixel_accuracy": 2.0}
    monkeypatch.setattr(SegmentTask, "evaluate", lambda task: next(invented) | scores)
    result = segment(scene_run, "optim.length=7")
    steps = {}
    for name in ("best", "last"):
        with safe_open(scene_run / "upernet_ade20k" / f"{name}.safetensors", "pt") as file:
            steps[name] = (file.metadata()["step"], file.metadata()["miou"])
    assert steps == {"best": ("6", "30.0000"), "last": ("7", "25.0000")}
    assert result["scores"] == {"miou": 25.0, **scores}


def test_a_linear_head_leaves_the_frozen_network_as_it_was(scene_run):
    result = segment(scene_run, recipe="linear_segment_ade20k")
    tensors = load_file(scene_run / "linear_segment_ade20k" / "last.safetensors")
    student = load_file(scene_run / "student.safetensors")
    for name, tensor in student.items():
        assert torch.equal(tensors[f"backbone.{name}"], tensor), name
    others = {name for name in tensors if not name.startswith("backbone.")}
    assert others == {f"decoder.classifier.{name}" for name in ("weight", "bias")} | {
        f"decoder.batch_norm.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    assert result["settings"]["head"] == "linear" and result["settings"]["frozen"] is True


def test_a_larger_segmenter_s_logits_are_distilled(scene_run, tmp_path):
    segment(scene_run, f"run.dir={tmp_path / 'teacher'}")
    teacher = tmp_path / "teacher" / "best.safetensors"
    before = teacher.read_bytes()
    result = segment(scene_run, f"distill.teacher={teacher}", recipe="g2sd_segment_small")
    row = rows(scene_run / "g2sd_segment_small")[-1]
    assert row["loss"] == pytest.approx(row["map"] + 0.4 * row["auxiliary"] + 3 * row["logits"])
    assert row["logits"] > 0 and result["settings"]["distill"] is True
    assert teacher.read_bytes() == before
    state = torch.load(scene_run / "g2sd_segment_small" / "resume.pt", weights_only=True)
    assert not [name for name in state["task"] if "teacher" in name]
    with refused("distill.teacher", "not found", "best.safetensors"):
        segment(scene_run, "distill.teacher=nothing", "run.dir=x", recipe="g2sd_segment_small")
    with refused("distill.teacher", scene_run / "student.safetensors", "eval segment"):
        segment(
            scene_run,
            f"distill.teacher={scene_run / 'student.safetensors'}",
            f"run.dir={tmp_path / 'other'}",
            recipe="g2sd_segment_small",
        )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_of_logit_maps_equals_loops_in_float64(temperature):
    generator = torch.Generator().manual_seed(0)
    student = 2 * torch.randn(2, 5, 3, 4, generator=generator)
    teacher = 2 * torch.randn(2, 5, 3, 4, generator=generator)
    expected = float64.kl_of_pixels(student.double().numpy(), teacher.double().numpy(), temperature)
    actual = logit_map_loss(student, teacher, temperature=temperature)
    assert actual.item() == pytest.approx(expected, abs=1e-6)
    assert logit_map_loss(student, student, temperature=temperature).item() == pytest.approx(0, abs=1e-7)
    coarse = 2 * torch.randn(2, 5, 6, 8, generator=generator)  # of another grid
    fitted = float64.resize(coarse.double().numpy(), 3, 4)
    expected = float64.kl_of_pixels(student.double().numpy(), fitted, temperature)
    actual = logit_map_loss(student, coarse, temperature=temperature)
    assert actual.item() == pytest.approx(expected, abs=1e-6)


def test_pixels_without_a_class_count_in_the_mean_and_give_no_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5), generator=generator)
    labels[0, :, 2:] = 255
    total = 0.0
    for image, row, column in np.ndindex(2, 4, 5):
        if labels[image, row, column] != 255:
            values = logits[image, :, row, column].detach().double()
            total += float(values.logsumexp(0) - values[labels[image, row, column]])
    assert map_loss(logits, labels, no_class=255).item() == pytest.approx(total / 40, abs=1e-6)
    loss = map_loss(logits, torch.full_like(labels, 255), no_class=255)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("size", [(40, 24), (7, 9), (16, 100), (1, 1)])
def test_every_pixel_of_any_image_is_predicted(scene_run, size):
    segment(scene_run, "optim.length=2", "optim.evaluate_every=2")
    segmenter, facts = load_segmenter(scene_run / "upernet_ade20k" / "last.safetensors", label="file")
    predict = Predictor(facts.short_side, facts.window, facts.stride)
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    predicted = predict(segmenter, image, Normalize(facts.mean, facts.std))
    assert predicted.shape == size and predicted.dtype == torch.int64
    assert predicted.min() >= 0 and predicted.max() < 5


def test_mistakes_are_refused_before_anything_is_written(scene_run, shards, tmp_path):
    for overrides, words in (
        ([f"data.train={shards[0]}"], ("data.train", shards[0], "label maps", "--masks")),
        (["optim.global_batch=1"], ("batch norm", 2, "optim.micro_batch")),
        (["optim.global_batch=5", "optim.micro_batch=2"], ("optim.micro_batch 2", "optim.global_batch 5")),
        (["optim.warmup_steps=6"], ("optim.warmup_steps 6", "6 steps")),
        (["stride=17"], ("stride 17", "network.img_size 16")),
        (["stride=225", "network.img_size=null"], ("stride 225", "network.img_size 224")),
        (["frozen=true"], ("frozen", "drop_path=0", "optim.layer_decay=1")),
        (["head.name=fcn"], ("head", "fcn", "upernet", "linear")),
        (["augment.scale=[2,1]"], ("augment.scale", "[2.0, 1.0]")),
        (["data.cache_gib=1"], ("data.cache_gib", "data.cache_dir")),
        (["optim.decay=steps"], ("optim.decay steps", "optim.milestones")),
        (["data.mean=[0.5]", "data.std=[0.5]", "network.in_chans=1"], ("data.mean", 3)),
        (["network.embed_dim=32"], ("embed_dim", 32, 24)),
    ):
        with refused(*words):
            segment(scene_run, *overrides)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (scene_run / "results.jsonl").exists()
    assert not (scene_run / "upernet_ade20k" / "config.yaml").exists()


def test_a_training_is_neither_overwritten_nor_continued_as_another(scene_run):
    segment(scene_run, "optim.length=2")
    with refused(scene_run / "upernet_ade20k", "--resume auto", "run.dir"):
        segment(scene_run, "optim.length=2")
    with refused(scene_run / "upernet_ade20k", "evaluation"):
        read_saved_config(scene_run / "upernet_ade20k")
    with refused("optim.lr", 0.01, 0.02):
        segment(scene_run, "optim.length=2", "optim.lr=0.02", resume="auto")


def test_a_loss_that_is_not_finite_ends_the_training(scene_run):
    with refused("finite", "optim.lr", error=RunFailed):
        segment(scene_run, "optim.lr=1e30", "optim.warmup_steps=0")
    assert not (scene_run / "results.jsonl").exists()


def test_a_weights_file_and_random_weights(scene_run, tmp_path, scenes):
    geometry = ["network.name=vit_tiny_patch16_224", "network.patch_size=4", "network.embed_dim=24"]
    file = tmp_path / "copy.safetensors"
    file.write_bytes((scene_run / "student.safetensors").read_bytes())
    data = [f"data.train={scenes / 'train'}", f"data.val={scenes / 'val'}"]
    given = [*geometry, "network.depth=2", "network.num_heads=2", *data, "optim.length=2", "precision=bf16"]
    assert segment(file, *given, f"run.dir={tmp_path / 'a'}")["step"] == STEP
    AcceleratorState._reset_state(reset_partial_state=True)
    result = segment(file, *given, f"run.dir={tmp_path / 'b'}", "init=random")
    assert result["step"] == 0 and result["settings"]["init"] == "random"
    assert result["settings"]["precision"] == "bf16"
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in "ab")
    assert {tensor.dtype for tensor in one.values() if tensor.is_floating_point()} == {torch.float32}
    assert not torch.equal(
        one["backbone.blocks.0.attn.qkv.weight"], other["backbone.blocks.0.attn.qkv.weight"]
    )
    assert json.loads((tmp_path / "a" / "results.jsonl").read_text())["metric"] == "segment"
