"""The report's board of segmentations: images, label maps and predictions of every segmenter of a run."""

from __future__ import annotations

import shutil

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmae_ds.data.dense import open_dense
from dmae_ds.report.dense_boards import add_dense_boards
from dmae_ds.report.segmentations import NUM_SHOWN, find_segmenters, show_segmentations
from dmae_ds.report.views import Views
from dmae_ds.report.write import write_report
from tests.dense.conftest import on_the_cpu, scene_run, segment, shards

__all__ = ["on_the_cpu", "scene_run", "shards"]  # fixtures


def predict_only(path, number):
    """Let a segmenter's file predict one class for all pixels."""
    tensors = load_file(path)
    tensors["decoder.classifier.weight"].zero_()
    tensors["decoder.classifier.bias"] = torch.full_like(tensors["decoder.classifier.bias"], -1.0)
    tensors["decoder.classifier.bias"][number] = 1
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def test_a_board_has_images_maps_and_predictions_in_the_classes_colours(scene_run, scenes):
    segment(scene_run, "optim.length=2", recipe="linear_segment_ade20k")
    folder = scene_run / "linear_segment_ade20k"
    predict_only(folder / "last.safetensors", 3)
    assert find_segmenters(scene_run) == [folder]
    rows = dict(show_segmentations([folder]).rows)
    assert list(rows) == ["image", "label map", "predicted"]
    assert all(len(images) == NUM_SHOWN for images in rows.values())
    val = open_dense(scenes / "val")
    of_class = {}
    for number in range(NUM_SHOWN):
        label_map = val[number].label_map
        height, width = label_map.shape
        assert np.array_equal(
            rows["image"][number][:height, :width], val[number].image.permute(1, 2, 0).numpy()
        )
        drawn = rows["label map"][number][:height, :width]
        for value in label_map.unique().tolist():
            colours = np.unique(drawn[label_map.numpy() == value], axis=0)
            assert len(colours) == 1
            assert of_class.setdefault(value, colours[0].tolist()) == colours[0].tolist()
        predicted = np.unique(rows["predicted"][number][:height, :width].reshape(-1, 3), axis=0)
        assert predicted.tolist() == [of_class.get(3, predicted[0].tolist())]
    assert of_class[255] == [0, 0, 0] and len({*map(tuple, of_class.values())}) == len(of_class)
    shutil.copytree(folder, scene_run / "second")
    both = dict(show_segmentations(find_segmenters(scene_run)).rows)
    assert "predicted, second" in both and "predicted, linear_segment_ade20k" in both


def test_the_page_shows_them_or_says_why_not(scene_run, tmp_path):
    segment(scene_run, "optim.length=2", recipe="linear_segment_ade20k")
    text = write_report([scene_run]).read_text()
    assert text.count('alt="label map, ') == text.count('alt="predicted, ') == NUM_SHOWN
    assert (scene_run / "figures" / "segmentations-run.png").is_file()
    views = {"run": Views(), "other": Views()}
    config = scene_run / "linear_segment_ade20k" / "config.yaml"
    config.write_text(config.read_text().replace("/val\n", "/moved\n"))
    other = tmp_path / "other"
    other.mkdir()
    assert add_dense_boards({"run": scene_run, "other": other}, views) == ["segmentations"]
    assert "moved" in views["run"].missing["segmentations"] and not views["run"].boards
    assert "eval segment" in views["other"].missing["segmentations"]
