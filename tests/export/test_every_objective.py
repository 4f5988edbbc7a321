"""`dmae-ds export` of a run of every shipped objective: it succeeds, and the card describes the objective."""

from __future__ import annotations

import json

import pytest
import yaml

from dmae_ds.cli.main import main
from dmae_ds.config.shipped import shipped_objectives
from tests.export.conftest import DECODER, STUDENT, make_classifier, make_run

TEACHER = {**STUDENT, "embed_dim": 36, "weights": "nowhere/teacher.pth"}
MASKED = {"mask_ratio": 0.9, "decoder": DECODER}
DINO = {
    **{"num_prototypes": 8, "hidden_dim": 8, "bottleneck_dim": 4},
    **{"local_crops": 1, "local_size": 12, "teacher_temperature_warmup_epochs": 1},
}
MOCO = {"hidden_dim": 8, "output_dim": 4}
FEATURES = {"targets": [{"where": "masked"}], "mask": {"ratio": 0.4}}
DISTILLED = {"distill": {"head": "linear"}}
# (sections of the recipe, words that the card must carry besides the objective's name)
RUNS = {
    "mae": ({"objective": MASKED}, ["0.9"]),
    "dmae": ({"objective": MASKED, "teacher": TEACHER}, ["0.9", "teacher.pth"]),
    "sdae": ({"objective": {**MASKED, "mask_ratio": 0.5}}, ["0.5"]),
    "dino": ({"objective": DINO}, []),
    "dino with distill": ({"objective": {**DINO, **DISTILLED}, "teacher": TEACHER}, ["distillation"]),
    "mocov3": ({"objective": MOCO}, []),
    "mocov3 with distill": ({"objective": {**MOCO, **DISTILLED}, "teacher": TEACHER}, ["distillation"]),
    "g2sd_generic": ({"objective": MASKED, "teacher": TEACHER}, ["0.9", "teacher.pth"]),
    "g2sd_specific": ({"objective": {}, "teacher": TEACHER}, ["teacher.pth"]),
    "tinymim": ({"objective": {}, "teacher": TEACHER}, ["teacher.pth"]),
    "amd": (
        {"objective": MASKED, "teacher": {**TEACHER, "sees": "superset", "mask_ratio": 0.5}},
        ["0.9", "teacher.pth"],
    ),
    "features": ({"objective": FEATURES, "teacher": TEACHER}, ["0.4", "teacher.pth"]),
    "adapt": (
        {"objective": {}, "teacher": TEACHER, "student": {**STUDENT, "weights": "nowhere/small.pth"}},
        ["anchor", "teacher.pth"],
    ),
}


def test_every_shipped_objective_is_covered():
    assert {run.split()[0] for run in RUNS} == set(shipped_objectives())


@pytest.mark.parametrize("name", RUNS)
def test_the_export_of_a_run_succeeds_and_its_card_describes_the_objective(tmp_path, capsys, name):
    sections, words = RUNS[name]
    objective = {"name": name.split()[0], **sections["objective"]}
    run = make_run(tmp_path / "run", **{**sections, "objective": objective})
    assert main(["export", str(run), "--to", "safetensors"]) == 0
    folder = run / "export" / "safetensors"
    assert str(folder) in capsys.readouterr().out
    card = json.loads((folder / "card.json").read_text())
    assert card["config"]["objective"]["name"] == objective["name"]
    assert (card["teacher"] is None) == ("teacher" not in sections)
    page = (folder / "README.md").read_text()
    assert yaml.safe_load(page.split("---")[1])["library_name"] == "timm"
    (trained_by,) = [line for line in page.splitlines() if line.startswith("| trained by |")]
    assert f"objective {objective['name']}" in trained_by
    assert not [word for word in words if word not in trained_by and word not in page]


@pytest.mark.parametrize("name", ["mae", "mocov3"])
def test_the_card_of_a_classifier_describes_both_trainings(tmp_path, name):
    sections, _ = RUNS[name]
    run = make_run(tmp_path / "run", objective={"name": name, **sections["objective"]})
    classifier = make_classifier(run / "finetune", pool="mean")
    assert main(["export", str(classifier), "--to", "safetensors", "--what", "classifier"]) == 0
    page = (classifier / "export" / "safetensors" / "README.md").read_text()
    assert f"objective {name}" in page and "10% labels" in page
