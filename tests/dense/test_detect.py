"""`dmae-ds eval detect` in this process: what it writes, resumes, distils and refuses."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmae_ds.config.detection import DetectConfig, RichnessConfig
from dmae_ds.config.load import load_config
from dmae_ds.data.dense import DenseSample, open_dense
from dmae_ds.dense.detect_task import DetectTask, pixels_of, target_of
from dmae_ds.dense.detector_file import load_detector
from dmae_ds.dense.early import check_detect
from dmae_ds.evaluate.results import read_results
from dmae_ds.finetune import checkpoint
from dmae_ds.finetune.source import find_source
from tests.data_prep.dense_sources import coco_content, make_coco, make_dense, make_voc
from tests.dense.conftest import assert_same_outcome, rows
from tests.dense.detectors import arguments, detect, make_student
from tests.dense.test_detector import build
from tests.messages import refused

PARTS = {"classifier", "box_reg", "mask", "objectness", "rpn_box_reg"}
DISTILLED = {"pyramid", "proposals"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student") / "student.safetensors")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, student, scenes):
    """The folder of a wider detector that was trained on the scenes."""
    folder = tmp_path_factory.mktemp("teacher")
    wide = make_student(folder / "wide.safetensors", embed_dim=24)
    detect(wide, scenes, folder / "out", "detector.channels=12")
    return folder / "out"


def test_a_training_leaves_its_numbers_and_a_file_that_builds_the_detector(student, scenes, tmp_path, capsys):
    result = detect(student, scenes, tmp_path)
    expected = {"metric": "detect", "step": 7, "num_train": 24, "num_val": 8, "world_size": 1}
    assert {name: result[name] for name in expected} == expected
    assert set(result["scores"]) == {f"{kind}_ap{at}" for kind in ("box", "mask") for at in ("", "50", "75")}
    assert read_results(tmp_path) == [{**result, "when": read_results(tmp_path)[0]["when"]}]
    first, last = rows(tmp_path)
    assert first["step"] == 3 and last["step"] == 6 and PARTS | {"loss", "lr", "grad_norm"} <= set(first)
    assert "box_ap" not in first and last["box_ap"] == result["scores"]["box_ap"]
    assert first["loss"] == pytest.approx(sum(first[part] for part in PARTS), rel=1e-5)
    assert last["loss"] < first["loss"] and "box AP" in capsys.readouterr().out
    detector, facts = load_detector(tmp_path / "last.safetensors", label="file")
    val = open_dense(scenes / "val")
    assert facts.classes == val.box_classes and facts.sizes == (32, 32)
    (found,) = detector([pixels_of(val[0])])
    assert found["masks"].shape[2:] == val[0].image.shape[1:]  # at the image's own size


@pytest.mark.parametrize(
    "distilled", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "with a teacher"]
)
def test_killed_at_a_write_and_resumed_it_ends_bit_for_bit_the_same(
    student, teacher, scenes, tmp_path, monkeypatch, distilled
):
    """The disk does not change between writes, so a kill between two of them equals a kill at the second."""
    overrides = [f"distill.teacher={teacher / 'best.safetensors'}", "distill.warmup_steps=5"]
    overrides = ["optim.micro_batch=4", *(overrides if distilled else [])]
    torch.manual_seed(1)  # nothing depends on what was drawn before
    detect(student, scenes, tmp_path / "whole", *overrides)
    assert (set(rows(tmp_path / "whole")[0]) >= DISTILLED) == distilled
    plain, out = checkpoint.replacing, tmp_path / "killed"

    def dies(path):
        if (out / "resume.pt").exists():  # at the second state, after the last epoch
            raise KeyboardInterrupt
        return plain(path)

    monkeypatch.setattr(checkpoint, "replacing", dies)
    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        detect(student, scenes, out, *overrides)
    monkeypatch.undo()
    detect(student, scenes, out, *overrides, resume="auto")
    assert_same_outcome(tmp_path / "whole", out)


def samples(*sizes):
    """Images with one box, a crowd and a box without an area each."""
    for number, (height, width) in enumerate(sizes):
        boxes = torch.tensor([[2, 3, 9, 8], [0, 0, 5, 5], [4, 4, 4, 9]], dtype=torch.float32)
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        masks[0, 3:8, 2:9] = True
        image = torch.full((3, height, width), 51 * number, dtype=torch.uint8)
        labels, crowd = torch.tensor([2, 0, 1]), torch.tensor([False, True, False])
        yield DenseSample(str(number), image, None, boxes, labels, masks, crowd)


def test_crowds_and_boxes_without_an_area_are_not_trained_on():
    (sample,) = samples((12, 10))
    target = target_of(sample)
    assert target["boxes"].tolist() == [[2, 3, 9, 8]] and target["labels"].tolist() == [3]
    assert target["masks"].dtype == torch.uint8 and target["masks"].sum() == 35


def test_the_distilled_loss_is_the_weighted_sum_and_warms_up_by_steps():
    torch.manual_seed(0)
    distill = RichnessConfig(teacher="file", alpha=0.5, beta=2.0, warmup_steps=4)
    teacher = build().requires_grad_(False)
    task = DetectTask(
        build(),
        num_classes=3,
        distill=distill,
        teacher=teacher,
        accumulation=2,
        seed=0,
        val_images=lambda: [],
        processes=None,
    )
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    weights = []
    for _ in range(10):
        parts = {name: value.item() for name, value in task.loss(list(samples((20, 32), (17, 9)))).items()}
        own = sum(parts[name] for name in PARTS)
        weights.append((parts["loss"] - own) / (0.5 * parts["pyramid"] + 2 * parts["proposals"]))
    assert weights == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1], abs=1e-4)
    task.loss(list(samples((20, 32))))["loss"].backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is not None for p in task.adapters.parameters())
    assert "num_batches" in task.state_dict()


def test_a_teacher_for_other_images_is_refused(student, teacher, scenes, tmp_path):
    given = f"distill.teacher={teacher / 'best.safetensors'}"
    with refused("data.mean", "0.4", "0.5"):
        detect(student, scenes, tmp_path / "a", given, "data.mean=[0.4, 0.4, 0.4]")
    coarse = make_student(tmp_path / "coarse.safetensors", patch_size=8)
    with refused("patches of 4 px", "8 px"):
        detect(coarse, scenes, tmp_path / "b", given)
    with refused("distill.teacher", "not a detector"):
        detect(student, scenes, tmp_path / "c", f"distill.teacher={student}")
    broken = tmp_path / "broken.safetensors"
    tensors = load_file(teacher / "best.safetensors")
    tensors.pop("rpn.head.cls_logits.bias")
    with safe_open(teacher / "best.safetensors", "pt") as file:
        save_file(tensors, broken, file.metadata())
    with refused("distill.teacher", "rpn.head.cls_logits.bias"):
        detect(student, scenes, tmp_path / "d", f"distill.teacher={broken}")
    assert not [path for path in "abcd" if (tmp_path / path).exists()]


def test_mistakes_are_found_before_torch(student, scenes, tmp_path, monkeypatch):
    """What `check_detect` finds without an image: test_architecture.py shows that it needs no torch."""

    def check(*overrides):
        given = arguments(scenes, tmp_path / "out", *overrides)
        source = find_source(str(student), schema=DetectConfig, recipe="vitdet_coco", overrides=given)
        check_detect(source, world_size=1, resume="never")

    check()
    with refused("distill.teacher", "nowhere.safetensors"):
        check("distill.teacher=nowhere.safetensors")
    with refused("optim.micro_batch", 3):
        check("optim.micro_batch=3")
    coco = make_coco(tmp_path / "coco")
    images, boxes = tmp_path / "coco" / "train2017", tmp_path / "boxes"
    make_dense(images, boxes, coco=coco)
    with refused("data.train", "data.val", "classes"):
        check(f"data.val={boxes}")
    voc = make_voc(tmp_path / "voc")
    only = voc / "ImageSets" / "Segmentation" / "train.txt"
    maps = {"masks": voc / "SegmentationClass", "only": only, "num_classes": 21}
    make_dense(voc / "JPEGImages", tmp_path / "maps", **maps)
    with refused("data.train", "no boxes", "--coco"):
        check(f"data.train={tmp_path / 'maps'}")
    content = coco_content()
    for entry in content["annotations"]:
        del entry["segmentation"]
    make_dense(images, tmp_path / "plain", coco=make_coco(tmp_path / "coco", content))
    with refused("data.train", "boxes without masks", "segmentation"):
        check(f"data.train={tmp_path / 'plain'}")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").touch()
    with refused("out", "--resume auto"):
        check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("pycocotools", "dmae-ds[dense]"):
        check()


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["detector.window=null", "detector.global_blocks=[1]"], ["global_blocks", "window"]),
        (["resize=[64, 32]", "jitter=null"], ["resize", "64"]),
        (["resize=[32, 64]"], ["jitter", "resize"]),
        (["jitter=[2, 1]"], ["jitter", "2"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, words):
    given = ["run.dir=out", "weights=file", "network.name=vit_base_patch16_224", "data.train=a", "data.val=b"]
    with refused(*words):
        load_config("vitdet_coco", [*given, *overrides], schema=DetectConfig, kind="evaluation recipe")
