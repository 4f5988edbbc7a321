"""From a folder, a teacher and a student to a recipe: what is made, used again, and refused. No training."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dmae_ds
from dmae_ds.config.load import load_config
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.distill.images import find_source
from dmae_ds.distill.request import Request
from dmae_ds.distill.resolve import resolve
from dmae_ds.distill.start import launch
from dmae_ds.errors import Requeue, RunFailed, UserError
from dmae_ds.train.apart import run_apart
from tests.distill.conftest import NAME, SMALL, STUDENT, write_images
from tests.messages import refused
from tests.processes import wait_until_ended


@pytest.fixture
def ask(photos, teacher_file, tmp_path, monkeypatch):
    """Resolve a request for the photos and the tiny teacher, in the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def resolve_request(*overrides: str, **changes) -> tuple[Path, int]:
        values = {"images": photos, "teacher": str(teacher_file), "student": NAME, **changes}
        return resolve(Request(**values, overrides=(*SMALL, *overrides)))

    return resolve_request


def test_a_flat_folder_becomes_shards_beside_it_and_a_recipe(ask, tmp_path, capfd):
    recipe, num_ranks = ask("optim.base_lr=0.001", epochs=2)
    config = load_config(str(recipe))
    assert num_ranks == 1 and recipe == tmp_path / "runs" / f"photos-{NAME}" / "recipe.yaml"
    assert Path(config.run.dir) == recipe.parent and config.optim.epochs == 2
    train, val = (ShardSet.open(folder, label="x") for folder in (config.data.train, config.data.val))
    assert (train.num_samples, val.num_samples, train.classes) == (27, 3, [])
    assert train.folder == tmp_path / "photos-shards" / "train"
    assert config.teacher.format == "timm" and config.teacher.sees == "all"
    assert config.teacher.img_size == 32  # 4 x 4 patches, as the student's
    assert config.optim.base_lr == 0.001 and config.optim.global_batch == 16
    assert config.student.overrides() == STUDENT
    head = recipe.read_text().partition("\nrun:")[0]
    assert "# " in head and "optim.global_batch=16" in head and "dmae-ds train" in head
    printed = capfd.readouterr().err
    assert "optim.global_batch=16" in printed and str(recipe) in printed

    shard, first = train.folder / "shard-000000.tar", recipe.read_bytes()
    made_at = shard.stat().st_mtime_ns
    assert ask("optim.base_lr=0.001", epochs=2) == (recipe, 1)  # as it was
    assert recipe.read_bytes() == first
    ask(epochs=3)  # nothing was trained: it may be begun with other options, from the same shards
    assert load_config(str(recipe)).optim.epochs == 3 and shard.stat().st_mtime_ns == made_at

    checkpoint = recipe.parent / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    recipe.write_text(recipe.read_text() + "# kept as it is\n")
    assert ask(epochs=3)[0] == recipe and recipe.read_text().endswith("# kept as it is\n")
    with refused("--epochs", "3", "4", "run.dir", "--resume auto"):
        ask(epochs=4)
    with refused("optim.base_lr=2", "run.dir"):
        ask("optim.base_lr=2", epochs=3)
    for text in ("optim: [", ""):
        recipe.write_text(text)
        with refused(recipe):
            ask(epochs=3)
    (recipe.parent / "distill.json").unlink()
    with refused(recipe.parent, "run.dir"):
        ask(epochs=3)


def test_folders_of_classes_of_parts_and_of_shards(ask, tmp_path, capfd):
    for name in ("ant", "bee"):
        write_images(tmp_path / "classes" / name, 10)
    config = load_config(str(ask(images=tmp_path / "classes")[0]))
    val = ShardSet.open(config.data.val, label="x")
    assert val.classes == ["ant", "bee"] and val.num_samples == 2
    shards = Path(config.data.train)
    config = load_config(str(ask("run.dir=again", images=shards)[0]))
    assert Path(config.data.train) == shards and config.data.val is None and config.eval.loss_every is None
    with refused("shards", "--shards and --max-skip"):
        ask("run.dir=other", images=shards, shards=tmp_path / "nowhere", max_skip=5)
    capfd.readouterr()
    shutil.copy(tmp_path / "classes" / "ant" / "0.jpg", tmp_path / "classes" / "cover.jpg")
    config = load_config(str(ask("data.val=null", images=tmp_path / "classes", shards=tmp_path / "flat")[0]))
    printed = capfd.readouterr().err
    assert all(word in printed for word in ("2 folders", "ant, bee", "cover.jpg"))
    assert ShardSet.open(config.data.train, label="x").num_samples == 21  # nothing is held out
    assert config.data.val is None and config.eval.loss_every is None
    (tmp_path / "classes" / "cover.jpg").unlink()
    (tmp_path / "parts").mkdir()
    for name in ("train", "val"):
        shutil.copytree(tmp_path / "classes", tmp_path / "parts" / name)
    config = load_config(str(ask(images=tmp_path / "parts", shards=tmp_path / "made")[0]))
    assert Path(config.data.val) == tmp_path / "made" / "val"
    assert ShardSet.open(config.data.train, label="x").num_samples == 20
    config = load_config(str(ask(f"data.val={shards}", "run.dir=third")[0]))
    assert ShardSet.open(config.data.train, label="x").num_samples == 30  # nothing is held out


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "tars").mkdir()
    for name in ("tars/a.tar", "file"):
        (tmp_path / name).write_text("x")
    for name, words in (
        ("nowhere", ("nowhere", "FOLDER")),
        ("file", ("file", "FOLDER")),
        ("empty", ("empty", ".jpg")),
        ("tars", ("1 tars", "dmae-shards index")),
    ):
        with refused(*words):
            find_source(tmp_path / name)


def test_changed_images_and_places_that_cannot_be_written(ask, photos, tmp_path):
    recipe, _ = ask()
    recipe.unlink()
    (photos / "0.jpg").rename(photos / "new.jpg")
    with refused("photos-shards", "--shards"):
        ask()
    (tmp_path / "file").write_text("")
    with refused("file/val", "--shards"):
        ask(shards=tmp_path / "file")
    with refused("file/run", "run.dir"):
        ask("run.dir=file/run", shards=tmp_path / "other")
    assert not (tmp_path / "other" / "val" / "journal.jsonl").exists()


def test_teachers_and_students_that_are_not_known(ask, tmp_path):
    (tmp_path / "text.pth").write_text("no network")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    for changes, words in (
        ({"teacher": "text.pth"}, ("text.pth",)),
        ({"teacher": "vit_bas_patch16_224"}, ("--teacher", "vit_base_patch16_224")),
        ({"student": "vit_tinny_patch16_224"}, ("--student", "vit_tiny_patch16_224")),
        ({"student": "resnet18"}, ("resnet18", "vit_")),
    ):
        with refused(*words):
            ask(**changes)
    values = {"images": tmp_path / "photos", "student": NAME}
    with refused("other.pth", "teacher.name", "teacher.embed_dim"):
        resolve(Request(**values, teacher="other.pth"))
    for word in ("data.train=x", "student.name=x", "teacher.weights=x"):
        with refused(word.partition("=")[0]):
            Request(**values, teacher="x", overrides=(word,))
    for word, argument in (
        ("data={train: x, num_workers: 0}", "FOLDER"),
        ("student={name: vit_small_patch16_224}", "--student"),
        ("teacher={name: x}", "--teacher"),
        ("run={dir: x}", "run.dir="),
        ("optim={epochs: 2}", "--epochs"),
        ("optim.epochs=2", "--epochs"),
    ):
        with refused(word.partition("=")[0], argument):
            Request(**values, teacher="x", epochs=1, overrides=(word,))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "photos-shards").exists()


def test_a_masked_autoencoder_sees_visible_patches(ask, teacher_file, tmp_path):
    state = torch.load(teacher_file, weights_only=True)
    whole = state | {"decoder_embed.weight": torch.zeros(16, 48)}
    torch.save(whole, tmp_path / "timm.pth")  # known by its decoder alone
    config = load_config(str(ask("teacher.format=timm", "run.dir=timm", teacher="timm.pth")[0]))
    assert (config.teacher.format, config.teacher.sees) == ("timm", "visible")
    torch.save({"model": state}, tmp_path / "mae.pth")  # by its format alone
    config = load_config(str(ask(teacher="mae.pth")[0]))
    assert (config.teacher.format, config.teacher.sees, config.teacher.standardize) == (
        "mae",
        "visible",
        "none",
    )


def test_ranks_of_a_launcher_are_refused_and_several_have_the_launcher(ask, monkeypatch, tmp_path):
    words, _ = launch(tmp_path / "recipe.yaml", 2)
    assert Path(words[0]).name == "deepspeed" and words[words.index("--num_gpus") + 1] == "2"
    assert words[-4:] == ["train", str(tmp_path / "recipe.yaml"), "--resume", "auto"]
    recipe, num_ranks = ask(ranks=3)
    assert num_ranks == 3 and load_config(str(recipe)).optim.global_batch % 3 == 0
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with refused("--ranks"):
        ask()


def test_the_python_api_is_imported_when_it_is_used():
    program = (
        "import inspect, sys, dmae_ds\n"
        "import dmae_ds.train.learning_rate\n"
        "for name in ('distill', 'export', 'train'):\n"
        "    function = getattr(dmae_ds, name)\n"
        "    assert callable(function) and 'Raises UserError' in function.__doc__, name\n"
        "    assert name in dir(dmae_ds) and name in dmae_ds.__all__\n"
        "assert list(inspect.signature(dmae_ds.distill).parameters)[:3] == ['images', 'teacher', 'student']\n"
        "assert dmae_ds.train.learning_rate.__name__ == 'dmae_ds.train.learning_rate'\n"
        "heavy = {'torch', 'timm', 'deepspeed'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dmae_ds.load_student.__name__ in dmae_ds.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dmae_ds.no_such_name


def test_what_runs_apart_ends_with_its_parent_and_says_how_it_ended(tmp_path):
    for code, error in ((0, None), (2, UserError), (75, Requeue), (1, RunFailed)):
        words = [sys.executable, "-c", f"raise SystemExit({code})"]
        if error is None:
            run_apart(words)
            continue
        with pytest.raises(error):
            run_apart(words)
    file = tmp_path / "pid"
    sleeper = (
        f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(600)"
    )
    program = (
        "import sys\nfrom dmae_ds.train.apart import run_apart\n"
        f"run_apart([sys.executable, '-c', {sleeper!r}])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    while not (file.exists() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_ended(int(file.read_text()))
