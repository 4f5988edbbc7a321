"""Views of a run's networks, and what is left of them if a file is missing."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import read_saved_config
from dmae_ds.evaluate.record import read_record
from dmae_ds.objectives.build import build_objective
from dmae_ds.report.reference import MAX_PARAMETERS, Teachers
from dmae_ds.report.views import SECTIONS, compute_cka, make_views
from tests.evaluate.conftest import STUDENT, make_run, make_teacher


def look_at(*runs):
    """The views of the last run, on a page with the others."""
    records = {run.name: read_record(run) for run in runs}
    return make_views(
        records[runs[-1].name], *build_objective(records[runs[-1].name].config), Teachers(records)
    )


def test_images_are_reconstructed_with_the_runs_weights(tmp_path, shards):
    run = make_run(tmp_path / "run", train=shards[0], val=shards[1])
    weights = load_file(run / "decoder.safetensors")
    save_file(
        {**weights, "decoder.pred.bias": weights["decoder.pred.bias"] + 100}, run / "decoder.safetensors"
    )
    board = dict(look_at(run).boards["pictures"].rows)
    original, reconstructed = board["original"][0], board["reconstructed"][0]
    visible, white = (reconstructed == original).all(axis=2), (reconstructed == 255).all(axis=2)
    assert white.mean() == 0.75 and (visible | white).all()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda run: (run / "student.safetensors").unlink(), "student.safetensors"),
        (lambda run: (run / "decoder.safetensors").write_bytes(b"half"), "decoder.safetensors"),
        (lambda run: shutil.copy(run / "student.safetensors", run / "decoder.safetensors"), "config.yaml"),
        (lambda run: shutil.rmtree(run.parent / "val"), "val"),
        (
            lambda run: (run / "config.yaml").write_text(
                re.sub("val: .*", "val: null", (run / "config.yaml").read_text())
            ),
            "data.val",
        ),
    ],
)
def test_without_images_every_section_gives_the_reason(tmp_path, shards, spoil, reason):
    shutil.copytree(shards[1], tmp_path / "val")
    run = make_run(tmp_path / "run", train=shards[0], val=tmp_path / "val")
    spoil(run)
    views = look_at(run)
    assert set(views.missing) == set(SECTIONS) and not views.boards
    assert all(reason in sentence for sentence in views.missing.values())


def test_a_missing_cut_or_too_large_teacher_costs_only_its_own_views(tmp_path, shards, teacher, monkeypatch):
    data = {"train": shards[0], "val": shards[1]}
    missing = look_at(make_run(tmp_path / "missing", **data, teacher=tmp_path / "nowhere.safetensors"))
    assert missing.missing.keys() == {"cka"} and "nowhere.safetensors" in missing.missing["cka"]
    assert missing.cka is None and len(missing.boards) == 4
    assert missing.boards["patches"].labels == ["original", "student, last"]
    three_blocks = make_teacher(tmp_path / "cut.safetensors", blocks=3)
    cut = look_at(make_run(tmp_path / "cut", **data, teacher=three_blocks))
    assert "3 of 4 blocks" in cut.missing["cka"] and cut.cka.shape == (2, 3) and cut.pairs == [(1, 3)]
    whole = make_run(tmp_path / "whole", **data, teacher=teacher)
    assert look_at(whole).cka.shape == (2, 4) and not look_at(whole).missing
    monkeypatch.setitem(MAX_PARAMETERS, "cpu", 1e4)
    assert "1e-05 B" in look_at(whole).missing["cka"]


def test_a_teacher_is_lent_only_to_a_run_with_the_same_grid(tmp_path, shards, teacher):
    data = {"train": shards[0], "val": shards[1]}
    lender = make_run(tmp_path / "lender", **data, teacher=teacher)
    same = look_at(lender, make_run(tmp_path / "same", **data, objective="mae"))
    assert same.teacher == "lender's teacher" and same.cka.shape == (2, 4) and same.pairs == []
    coarse = make_run(tmp_path / "other", **data, objective="mae", student={"patch_size": 8})
    other = look_at(lender, coarse)
    assert "lender" in other.missing["cka"] and "grid" in other.missing["cka"] and other.cka is None


def test_a_student_compared_with_itself_has_ones_on_the_diagonal(tmp_path, shards):
    alone = make_run(tmp_path / "alone", train=shards[0], val=shards[1], objective="mae")
    config = (alone / "config.yaml").read_text()
    shape = (
        "{name: vit_tiny_patch16_224, img_size: 16, patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2, "
        f"weights: {alone}, format: dmae_ds}}"
    )
    student = alone / "student.safetensors"
    save_file(
        load_file(student),
        student,
        metadata={
            "timm_name": "vit_tiny_patch16_224",
            "timm_overrides": json.dumps({key: value for key, value in STUDENT.items() if key != "name"}),
        },
    )
    copy = make_run(tmp_path / "copy", train=shards[0], val=shards[1])
    (copy / "config.yaml").write_text(
        re.sub(
            r"(?s)teacher:\n.*?objective:",
            f"teacher: {shape}\nobjective:",
            (copy / "config.yaml").read_text(),
        )
    )
    assert config != (copy / "config.yaml").read_text()
    shutil.copy(student, copy / "student.safetensors")
    config = read_saved_config(copy)
    weights = build_objective(config)[0].state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items() if not name.startswith("student.")},
        copy / "decoder.safetensors",
    )
    views = look_at(copy)
    assert np.diag(views.cka) == pytest.approx([1, 1], abs=1e-6) and views.cka[0, 1] < 1 - 1e-6
    assert views.missing == {} and views.pairs == [(1, 1)]


def test_a_teacher_without_cls_is_compared_over_the_same_patches():
    student = torch.randn(3, 1 + 9, 6, generator=torch.Generator().manual_seed(0))
    assert compute_cka({1: student}, {1: student[:, 1:]}) == pytest.approx(1)
    assert compute_cka({1: student}, {1: student[:, :-1]}) < 0.5
