"""A family of students trains each as it would train alone, bit for bit, and gives each a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.config.family import members_of
from dmae_ds.config.load import load_config
from dmae_ds.config.objectives import MaeConfig
from dmae_ds.distributed.world import World
from dmae_ds.evaluate.record import read_record
from dmae_ds.evaluate.results import read_history
from dmae_ds.objectives.build import build_objective
from dmae_ds.tools.checkpoint_convert import convert
from dmae_ds.tools.checkpoint_inspect import inspect, verify
from dmae_ds.train.preflight import prepare
from dmae_ds.train.stored_inputs import inputs_identity
from dmae_ds.weights.containers import open_container
from dmae_ds.weights.label import STUDENT
from tests.messages import refused
from tests.train.checkpoint.resharding import assert_same, move, source, start
from tests.train.conftest import command, metrics, run
from tests.train.test_resume import kill_at_step

MEMBERS = ("dmae", "features", "mae")
FILES = ("student.safetensors", "decoder.safetensors")
# All that a member could disturb in another: a queue, a view of its own, a masked pass of some images.
TARGETS = (
    "[{tap: tokens}, {name: masked, tap: tokens, where: masked}, "
    "{tap: cls, student: cls, distance: kl, over: queue, queue_size: 64}]"
)
FEATURES = (
    f"{{name: features, photometric: jitter, mask: {{whole_pass: true, every: 2}}, targets: {TARGETS}}}"
)
# Accumulation; a norm that each exceeds by itself.
HARD = ["optim.micro_batch=8", "optim.clip_grad=0.05", "optim.weight_decay=5", "data.num_workers=0"]
SHORT = [
    *HARD,
    "optim.warmup_epochs=0.01",
    f"optim.epochs={(4 * 16 - 1) / 1400}",
    "log.every_steps=1",
    "checkpoint.every_minutes=null",
]
HALF = MaeConfig(name="mae", mask_ratio=0.5)
KNN = ["eval.knn_every=1", "eval.knn_k=5", "eval.knn_labels=10%"]


@pytest.fixture(scope="session")
def family_recipe(tiny_recipe) -> list[str]:
    """Arguments of `dmae-ds train`: a family of three, of different widths and depths, by `tiny_recipe`."""
    shapes = {"dmae": (32, 4), "features": (32, 2), "mae": (16, 1)}
    sizes = [
        f"students.{name}.{key}={value}"
        for name, (width, depth) in shapes.items()
        for key, value in (("embed_dim", width), ("depth", depth), ("num_heads", 2))
    ]
    shared = [override for override in tiny_recipe[1:] if not override.startswith("student.")]
    return ["digits_family", *shared, *sizes, f"students.features.objective={FEATURES}"]


def family_and_alone(recipe: list[str], folder: Path, *more: str) -> list[list[str]]:
    """Steps of the driver: a family, then each of its students by the recipe that its folder has."""
    alone = [
        ["train", str(folder / name / "config.yaml"), f"run.dir={folder}-{name}", *more] for name in MEMBERS
    ]
    return [["train", *recipe, *SHORT, f"run.dir={folder}", *more], *alone]


def check_equal(folder: Path, *, atol: float = 0.0) -> None:
    for name in MEMBERS:
        alone = folder.parent / f"{folder.name}-{name}"
        for file in FILES:
            one, other = load_file(folder / name / file), load_file(alone / file)
            assert one.keys() == other.keys()
            for key, tensor in other.items():
                torch.testing.assert_close(one[key], tensor, rtol=0, atol=atol)
        for mine, other in zip(metrics(folder / name), metrics(alone), strict=True):
            assert mine.keys() == other.keys()
            assert mine["loss"] == pytest.approx(other["loss"], rel=atol, abs=0)


@pytest.fixture(scope="module")
def trained(family_recipe, tmp_path_factory) -> Path:
    """The folder of a family; its students alone are next to it."""
    folder = tmp_path_factory.mktemp("family") / "all"
    start(family_and_alone(family_recipe, folder, "deepspeed=zero0", *KNN), ranks=1, cwd=folder.parent)
    return folder


def test_each_student_is_the_one_that_it_would_have_been_alone(trained):
    check_equal(trained)
    for name in MEMBERS:
        (mine,), (other,) = (
            read_history(folder) for folder in (trained / name, trained.parent / f"all-{name}")
        )
        assert mine["scores"] == other["scores"] and mine["step"] == other["step"] == 4


def test_the_run_knows_all_and_each_folder_is_a_run(trained, family_recipe):
    last = metrics(trained)[-1]
    assert last["loss"] == pytest.approx(sum(last[f"{name}/loss"] for name in MEMBERS))
    assert {"dmae/share/3", "mae/rank/mean", "features/knn/top1"} <= last.keys()
    for name in MEMBERS:
        record = read_record(trained / name)
        assert record.config.student.depth == {"dmae": 4, "features": 2, "mae": 1}[name]
        assert record.rows[-1]["knn/top1"] == last[f"{name}/knn/top1"]
        assert not any(key.startswith(MEMBERS) for key in record.rows[-1])
        assert json.loads((trained / name / "starts.jsonl").read_text())["step"] == 0
    assert not (trained / "student.safetensors").exists()
    assert "step-00000004" in inspect(trained) and "step-00000004: complete" in verify(trained)
    assert inspect(trained / "mae") == inspect(trained) and verify(trained / "mae") == verify(trained)


@pytest.mark.slow
def test_a_checkpoint_is_converted_for_each_student(trained, tmp_path):
    convert(trained, tmp_path / "all")
    convert(trained / "mae", tmp_path / "mae")
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(MEMBERS)
    for name, folder in {
        **{name: tmp_path / "all" / name for name in MEMBERS},
        "mae": tmp_path / "mae",
    }.items():
        assert (folder / "latest_universal").read_text() == "step-00000004"
        converted = sorted(path.parent.name for path in folder.glob("*/zero/*/fp32.pt"))
        weights = load_file(trained / name / "student.safetensors")
        assert converted and {f"student.{key}" for key in weights} & set(converted)


def test_a_family_is_continued_as_a_whole(trained, family_recipe, tmp_path):
    arguments = [*family_recipe[1:], *SHORT, "deepspeed=zero0", *KNN]
    world = World(rank=0, local_rank=0, size=1, local_size=1)

    def prepared(*more: str, resume: str = "auto"):
        return prepare(load_config("digits_family", [*arguments, *more]), world, resume=resume)

    assert prepared(f"run.dir={trained}").is_finished
    with refused(trained, "--resume auto"):
        prepared(f"run.dir={trained}", resume="never")
    with refused("students", "mae", "depth"):
        prepared(f"run.dir={trained}", "students.mae.depth=2")
    with refused(trained / "mae", trained / "config.yaml"):
        prepare(load_config(str(trained / "mae" / "config.yaml")), world, resume="auto")
    with refused("students.mae.weights", "nowhere"):
        prepared(f"run.dir={tmp_path}", "students.mae.weights=nowhere")
    other = tmp_path / "mae"
    other.mkdir()
    for file in ("config.yaml", "student.safetensors"):
        (other / file).write_bytes((trained / "mae" / file).read_bytes())
    for resume in ("auto", "never"):
        with refused(other, "students.mae"):
            prepared(f"run.dir={tmp_path}", resume=resume)
    with refused("student.weights", trained / "dmae", trained / "mae"):
        open_container(trained, label=STUDENT)
    (trained / "mae" / "student.safetensors").rename(tmp_path / "kept")
    assert not prepared(f"run.dir={trained}").is_finished
    (tmp_path / "kept").rename(trained / "mae" / "student.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, stages, more",
    [(1, (2, 3), []), (2, (0, 2, 3), []), (2, (2,), ["teacher.placement=pipeline", "teacher.stages=2"])],
    ids=["alone", "2 ranks", "2 ranks, streamed teacher"],
)
def test_at_every_zero_stage_and_on_two_ranks(family_recipe, tmp_path, ranks, stages, more):
    steps = []
    for stage in stages:
        # A member without a teacher has no placement.
        of_family, *alone = family_and_alone(
            family_recipe, tmp_path / f"stage{stage}", f"deepspeed=zero{stage}"
        )
        steps += [[*of_family, *more], *alone]
    start(steps, ranks=ranks, cwd=tmp_path)
    for stage in stages:
        check_equal(tmp_path / f"stage{stage}", atol=1e-5 if stage == 3 else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bit_identical(family_recipe, tmp_path, ranks):
    more = [
        *(override for override in SHORT if not override.startswith("optim.epochs")),
        f"optim.epochs={20 * 16 / 1400}",
        "checkpoint.every_steps=5",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_at_step(family_recipe, killed, 12, ranks=ranks, more=more)
    assert json.loads((killed / "starts.jsonl").read_text())["step"] == 0
    for folder in (whole, killed):
        arguments = ["train", *family_recipe, *more, f"run.dir={folder}", "--resume", "auto"]
        done = run(command(arguments, ranks=ranks), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads((killed / "starts.jsonl").read_text().splitlines()[1])["step"] >= 5
    for name in MEMBERS:
        for file in FILES:
            one, other = load_file(killed / name / file), load_file(whole / name / file)
            assert all(torch.equal(one[key], other[key]) for key in other)
        steps = [(line["step"], line["loss"]) for line in metrics(killed / name)]
        assert steps == [(line["step"], line["loss"]) for line in metrics(whole / name)]


@pytest.mark.slow
def test_a_family_is_resharded(family_recipe, tmp_path):
    start([source(family_recipe, tmp_path, stage, 1) for stage in (0, 3)], ranks=1, cwd=tmp_path)
    steps = move(family_recipe, tmp_path, ranks=(1, 2), stages=(0, 2)) + move(
        family_recipe, tmp_path, ranks=(1, 2), stages=(3, 1)
    )
    start(steps, ranks=2, cwd=tmp_path)
    for written, read in (("1x0", "1x0-2x2"), ("1x3", "1x3-2x1")):
        for name in MEMBERS:
            assert_same(tmp_path / read / name, tmp_path / written / name)


@pytest.mark.slow
def test_commands_take_the_folders_of_students(trained):
    done = run(command(["eval", "knn", str(trained / "features"), "--k", "5"], ranks=1), cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    assert len(read_history(trained / "features")) == 2
    done = run(command(["eval", "knn", str(trained)], ranks=1), cwd=trained.parent)
    assert done.returncode == 2 and str(trained / "mae") in done.stderr
    done = run(command(["export", str(trained / "mae"), "--to", "timm"], ranks=1), cwd=trained.parent)
    assert done.returncode == 0, done.stderr
    for arguments in (["report", str(trained)], ["report", "--results", str(trained), "--out", "RESULTS.md"]):
        done = run(command(arguments, ranks=1), cwd=trained.parent)
        assert done.returncode == 0, done.stderr
    page = (trained / "comparison.html").read_text()
    assert all(name in page for name in MEMBERS)
    assert not (trained / "results.jsonl").exists()


def test_stored_features_are_those_of_the_one_pass_of_a_family():
    config = load_config("digits_family")
    with refused("stored", "FAMILIES.md"):
        inputs_identity(build_objective(config)[0], config)
    students = {name: config.students[name] for name in ("mae", "dmae")}
    family, alone = config.model_copy(update={"students": students}), members_of(config)["dmae"]
    family = family.model_copy(
        update={
            "students": {**students, "mae": config.students["mae"].model_copy(update={"objective": HALF})}
        }
    )
    found = [inputs_identity(build_objective(one)[0], one) for one in (family, alone)]
    assert found[0] == found[1]  # of dmae, though mae comes first, and sees other patches
