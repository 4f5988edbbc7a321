"""Code of your own: every command finds it in its folder; what is wrong with it is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dmae_ds.cli.main import main
from dmae_ds.config.load import dump_config, load_config, read_saved_config
from dmae_ds.config.own_code import import_own
from dmae_ds.evaluate.features import build_timm, load_student
from dmae_ds.export.source import open_source
from dmae_ds.objectives.build import check_taps
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.engine import check_losses
from dmae_ds.train.preflight import check_may_begin
from tests.messages import refused

ROOT = Path(__file__).parents[2]
CODE = """
from typing import ClassVar, Literal
import timm
from dmae_ds.config.objectives import MaskedPixels
from dmae_ds.config.objective_base import FeatureDistillationConfig
from dmae_ds.objectives.dmae import Dmae

class Mine(Dmae):
    class Config(FeatureDistillationConfig, MaskedPixels):
        needs_teacher: ClassVar[bool] = True
        name: Literal["own_lab_code:Mine"]
        extra: int = 3

        @property
        def distillation(self):
            return self

def build(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **kwargs)

def to_timm(name):
    return name.removeprefix("net.") if name.startswith("net.") else None
"""
SMALL = ["img_size=32", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=2"]
TEACHER = ["teacher.name=own_lab_code:build", "teacher.format=own_lab_code:to_timm"]
OVERRIDES = [f"{section}.{word}" for section in ("student", "teacher") for word in SMALL]
OWN = [
    *TEACHER,
    *OVERRIDES,
    "objective={name: 'own_lab_code:Mine', decoder: {depth: 1, embed_dim: 16, num_heads: 2}}",
]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A folder with own code, which Python does not know yet."""
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "own_lab_code.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(folder))])
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_lab")]:
        del sys.modules[name]


def test_code_is_found_in_the_working_folder_and_next_to_the_recipe(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with refused("objective", "own_lab_code", "own_lab_code.py"):
        load_config("digits_dmae", OWN)
    recipe = yaml.safe_load((ROOT / "launch" / "recipes" / "digits_dmae.yaml").read_text())
    (lab / "mine.yaml").write_text(yaml.safe_dump(recipe))
    assert load_config("lab/mine.yaml", OWN).objective.extra == 3
    del sys.modules["own_lab_code"]
    sys.path.remove(str(lab))
    monkeypatch.chdir(lab)
    assert main(["plan", "digits_dmae", "--gpus", "2", *OWN]) == 0, capsys.readouterr().err


def test_evaluation_and_export_of_a_student_need_no_own_code(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(lab)
    sys.path.append(str(lab))
    config = load_config("digits_dmae", OWN)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    save_file(build_timm(config.student).state_dict(), run / "student.safetensors")
    del sys.modules["own_lab_code"]
    sys.path.remove(str(lab))
    assert load_student(run).embed_dim == 24
    source = open_source(run, "encoder")
    assert source.config.objective.model_dump()["extra"] == 3
    with refused("own_lab_code"):
        read_saved_config(run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["own_lab_wrong.py"]),
        ("x = 1\n", ["own_lab_wrong.py", "Class"]),
        ("x = 1\nclass Class(:\n", ["SyntaxError", "own_lab_wrong.py:2"]),
        ("\n\nx = 1 / 0\n", ["ZeroDivisionError", "own_lab_wrong.py:3"]),
        ("import no_such_module\n", ["no_such_module"]),
    ],
)
def test_what_is_wrong_with_own_code_is_one_line(lab, text, words):
    if text is not None:
        (lab / "own_lab_wrong.py").write_text(text)
    sys.path.append(str(lab))
    with refused(*words, error=ImportError):
        import_own("own_lab_wrong:Class")


def test_losses_and_taps_of_an_objective():
    good = torch.ones((), requires_grad=True)
    check_losses({"loss": good, "part": torch.ones(())}, "Mine")
    for losses, word in (
        ({"pixel": good}, "pixel"),
        ({}, "nothing"),
        (good, "Tensor"),
        (None, "NoneType"),
        ({"loss": torch.ones(2, requires_grad=True)}, "[2]"),
        ({"loss": torch.ones(())}, "without"),
    ):
        with refused("Mine", "'loss'", word):
            check_losses(losses, "Mine")
    shape = TeacherShape(12, 24, 2, 16, 8)
    check_taps(("block/12", "decoder/2", "logits"), shape)
    for tap in ("block/13", "decoder/3", "block/0", "blocks/3", "block"):
        with refused(f"'{tap}'", "block/" if "decoder" not in tap else "decoder/"):
            check_taps((tap,), shape)
    with refused("block/1", "teacher.name"):
        check_taps(("block/1",), None)


def test_a_folder_without_a_checkpoint_can_be_started_again(tmp_path):
    (tmp_path / "config.yaml").touch()
    folder = CheckpointFolder(tmp_path)
    check_may_begin(folder, "never")
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    for path in (tmp_path / "student.safetensors", tmp_path / "results.jsonl", checkpoint / "state.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with refused("run.dir", "--resume auto"):
            check_may_begin(folder, "never")
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("start", [["dmae-ds"], ["deepspeed", "--num_gpus", "1", "--module", "dmae_ds"]])
def test_own_code_from_train_to_report(lab, digits, start):
    """Every command with the code in the working folder alone, also under DeepSpeed's launcher."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", "from dmae_ds.cli.main import main; raise SystemExit(main())"]

    def run(*words, start=program):
        done = subprocess.run([*start, *words], cwd=lab, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr

    config = load_config("digits_dmae", [word for word in OVERRIDES if word.startswith("student")])
    torch.save({"net": build_timm(config.student).state_dict(), "epoch": 3}, lab / "t.pth")
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "data.num_workers=0"]
    batch = ["optim.global_batch=100", "optim.epochs=1", "optim.warmup_epochs=0", "run.dir=run"]
    first = program if start == ["dmae-ds"] else [str(Path(sys.executable).with_name(start[0])), *start[1:]]
    run("train", "digits_dmae", *OWN, *data, *batch, "teacher.weights=t.pth", start=first)
    run("eval", "knn", "run", "--k", "2")
    run("export", "run", "--to", "timm")
    run("report", "run")
    assert (lab / "run" / "report.html").is_file()
