"""The card of an export has every known fact, and "unknown" where there is none."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import yaml
from PIL import Image

from dmae_ds.config.load import read_saved_config
from dmae_ds.evaluate.results import append_result
from dmae_ds.export.export import export
from dmae_ds.export.source import open_source
from dmae_ds.export.teacher_facts import describe_initial, describe_teacher
from dmae_ds.export.to_onnx import explain_onnx
from dmae_ds.export.to_timm import reads_folders
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.starts import append_start, describe_environment
from tests.export.conftest import DATA, DECODER, STUDENT, make_classifier, make_run

TEACHER = {**STUDENT, "embed_dim": 36}


def distilled(folder, **teacher):
    return make_run(
        folder,
        teacher={**TEACHER, **teacher},
        objective={"name": "dmae", "mask_ratio": 0.5, "decoder": DECODER},
    )


def licence(folder, **teacher):
    described = describe_teacher(read_saved_config(distilled(folder, **teacher)))
    return described["license"], described["license_from"]


def test_a_licence_is_where_it_was_stated(tmp_path):
    (tmp_path / "plain").mkdir()
    weights = tmp_path / "plain" / "mae_pretrain_vit_large.pth"
    weights.write_bytes(b"weights")
    assert licence(tmp_path / "a", weights=str(weights)) == ("unknown", "a card next to the weights")
    assert licence(tmp_path / "b", weights=str(weights), license="cc-by-nc-4.0") == (
        "cc-by-nc-4.0",
        "teacher.license of the recipe",
    )
    (tmp_path / "plain" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert licence(tmp_path / "c", weights=str(weights))[0] == "apache-2.0"
    (tmp_path / "plain" / "README.md").write_text("A folder of mine.\n")
    assert licence(tmp_path / "d", weights=str(weights))[0] == "unknown"
    named = licence(tmp_path / "e", name="vit_large_patch16_224.mae", pretrained=True)
    assert named == ("cc-by-nc-4.0", "timm's entry of the weights")
    assert licence(tmp_path / "f", weights="nobody/nothing")[0] == "unknown"


def test_a_student_as_teacher_has_its_own_teacher_s_licence(tmp_path):
    first = make_run(tmp_path / "first", student=TEACHER)
    second = distilled(tmp_path / "second", weights=str(first / "student.safetensors"))
    described = describe_teacher(read_saved_config(second))
    assert described["license"] == "none of others" and described["teacher"] is None
    assert len(described["sha256"]) == 64 and described["fingerprint"] is None
    known = {"fingerprint": {"block/1": [1.0, 2.0]}}
    (first / "student.safetensors.teacher.json").write_text(json.dumps(known))
    assert describe_teacher(read_saved_config(second))["fingerprint"] == known["fingerprint"]
    limited = distilled(tmp_path / "limited", weights=str(tmp_path / "gone.pth"), license="cc-by-nc-4.0")
    third = describe_teacher(read_saved_config(distilled(tmp_path / "third", weights=str(limited))))
    assert third["license"] == "cc-by-nc-4.0"
    assert third["teacher"]["license_from"] == "teacher.license of the recipe"
    assert describe_teacher(read_saved_config(first)) is None


def test_of_several_teachers_each_licence_is_named(tmp_path):
    def run(name, **licences):
        return make_run(
            tmp_path / name,
            teachers={
                one: {**TEACHER, "weights": f"{one}.pth", "license": text} for one, text in licences.items()
            },
            objective={
                "name": "features",
                "targets": [{"tap": f"{one}:tokens", "head": "norm_linear"} for one in licences],
            },
        )

    several = run("several", dino="mit", mae="cc-by-nc-4.0")
    facts = describe_teacher(read_saved_config(several))
    assert facts["teachers"]["mae"]["weights"] == "mae.pth"
    assert facts["teachers"]["dino"]["license_from"] == "teachers.dino.license of the recipe"
    for text in ("mit (dino)", "cc-by-nc-4.0 (mae)"):
        assert text in facts["license"]
    assert licence(tmp_path / "taught", weights=str(several))[0] == facts["license"]
    same = describe_teacher(read_saved_config(run("same", dino="mit", mae="mit")))
    assert same["license"] == "mit"
    out, card = export(several, to="safetensors", license="other")
    page = (out / "README.md").read_text()
    assert (
        card["teacher"] == facts and "dino: " in page and "mae.pth" in page and "cc-by-nc-4.0 (mae)" in page
    )


def test_a_student_that_continues_others_weights_has_their_licence(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    (tmp_path / "hub" / "model.pth").write_bytes(b"weights")
    begun = make_run(tmp_path / "begun", student={**STUDENT, "weights": str(tmp_path / "hub" / "model.pth")})
    facts = describe_initial(read_saved_config(begun))
    assert facts["license"] == "other" and len(facts["sha256"]) == 64 and facts["teacher"] is None
    assert licence(tmp_path / "a", weights=str(begun))[0] == "other"  # of a student of such a student
    taught = distilled(tmp_path / "taught", weights="gone.pth", license="cc-by-nc-4.0")
    again = make_run(tmp_path / "again", student={**STUDENT, "weights": str(taught)})
    assert describe_initial(read_saved_config(again))["license"] == "cc-by-nc-4.0"
    out, card = export(begun, to="safetensors", license="other")
    assert card["initial"] == facts and "model.pth" in (out / "README.md").read_text()
    alone = make_run(tmp_path / "alone")
    assert describe_initial(read_saved_config(alone)) is None
    last = make_run(tmp_path / "last", student={**STUDENT, "weights": str(alone)})
    assert describe_initial(read_saved_config(last))["license"] == "none of others"


def test_the_card_holds_identity_data_config_metrics_and_the_check(tmp_path):
    run = distilled(tmp_path / "run", weights="gone.pth", license="cc-by-nc-4.0")
    folder = CheckpointFolder(run)
    folder.begin(1234)
    folder.commit(1234, {"step": 1234, "fingerprint": "f" * 64}, {})
    append_result(
        run,
        {
            "metric": "knn",
            "scores": {"top1": 71.25},
            "labels": "10%",
            "subset_seed": 3,
            "settings": {"k": 20},
            "step": 1234,
            "num_train": 140,
            "num_val": 397,
            "data": "f" * 64,
            "val": "e" * 64,
            "seconds": 1.0,
            "device": "cpu",
            "world_size": 1,
        },
    )
    environment = describe_environment(device="cpu", world_size=4)
    trained_on = {**environment, "version": "0.0.9", "torch": "2.6.1", "commit": "0123456789ab"}
    append_start(run, read_saved_config(run), trained_on, step=0)
    out, card = export(run, to="safetensors", license="cc-by-nc-4.0")
    assert card["trained_on"]["world_size"] == 4 and card["pixels"]["pool"] == "mean"
    stored = json.loads((out / "card.json").read_text())
    assert stored == json.loads(json.dumps(card))
    assert (
        stored["data"]["fingerprint"] == "f" * 64
        and stored["step"] == 1234
        and stored["metrics"][0]["scores"] == {"top1": 71.25}
    )
    assert stored["config"] == read_saved_config(run).model_dump(mode="json") and set(stored["versions"]) >= {
        "torch",
        "timm",
        "dmae-ds",
    }
    assert (
        stored["check"]["largest"]
        == stored["check"]["differences"]["tokens"]
        <= stored["check"]["limits"]["tokens"]
        == 1e-5
    )
    text = (out / "README.md").read_text()
    assert all(words in text for words in ("dmae-ds 0.0.9 (0123456789ab)", "torch 2.6.1"))
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "license": "cc-by-nc-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dmae-ds"],
    }
    assert (
        "| teacher's licence | cc-by-nc-4.0 (teacher.license of the recipe) |" in text
        and "| knn | 10%, seed 3 | top-1 71.25% | k 20 | 1234 | cpu |" in text
    )


def test_unknown_facts_are_named(shared_run, tmp_path):
    out, card = export(shared_run, to="safetensors", out=tmp_path / "plain")
    assert card["data"]["fingerprint"] == card["license"] == "unknown"
    assert card["data"]["fingerprint_from"] == "no checkpoint"
    text = (out / "README.md").read_text()
    assert card["trained_on"] is None and "not recorded" in text
    assert "license: unknown" in text and "| teacher | none |" in text
    assert "| metric |" not in text


def test_a_classifier_s_card_names_the_student_s_teacher_and_its_own_training(tmp_path):
    run = distilled(tmp_path / "run", weights="gone.pth", license="cc-by-nc-4.0")
    out, card = export(
        make_classifier(run / "finetune_mae", pool="mean"), to="safetensors", what="classifier"
    )
    assert out == run / "finetune_mae" / "export" / "safetensors"
    assert card["teacher"]["license"] == "cc-by-nc-4.0" and card["evaluation"]["labels"] == "10%"
    page = (out / "README.md").read_text()
    assert all(words in page for words in ("mask ratio 0.5", "10% labels", "step 1,234 |"))
    _, card = export(make_classifier(tmp_path / "own", pool="mean"), to="safetensors", what="classifier")
    assert card["config"] is None and card["teacher"]["weights"] == "someone/else"
    assert card["teacher"]["license"] == "unknown"


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_the_code_on_the_card_runs(shared_run, tmp_path, monkeypatch, to):
    if to == "timm" and not reads_folders(timm.__version__):
        pytest.skip(f"timm {timm.__version__} reads no safetensors out of a folder")
    out, _ = export(shared_run, to=to, out=tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (50, 40)).save("image.png")
    names = {"pixels": torch.zeros(1, 3, 24, 24)}
    exec((out / "README.md").read_text().split("```")[1].removeprefix("python"), names)
    assert names["tokens"].shape == (1, 17, 24)


@pytest.mark.parametrize("channels, colours", [(2, "as stored"), (3, "RGB"), (4, "as stored")])
def test_the_code_for_onnx_says_what_an_image_s_channels_are(tmp_path, channels, colours):
    numbers = {"mean": [0.5] * channels, "std": [0.25] * channels}
    run = make_run(tmp_path / "run", student={**STUDENT, "in_chans": channels}, data={**DATA, **numbers})
    code = explain_onnx(open_source(run, "encoder"), "onnx")
    assert f"[N, 24, 24, {channels}], 0 to 255, {colours}" in code
