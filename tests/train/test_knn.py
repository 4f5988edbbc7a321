"""k-NN during training: it is measured when due, changes nothing, and agrees with `dmae-ds eval knn`."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.config.load import load_config
from dmae_ds.config.networks import NamedTeacherConfig
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed
from dmae_ds.evaluate.record import read_record
from dmae_ds.evaluate.results import read_history
from dmae_ds.train.dense import DenseDuringTraining
from dmae_ds.train.evaluations import with_ways_on
from dmae_ds.train.preflight import prepare
from dmae_ds.train.schedule import Schedule
from dmae_ds.train.val_loss import check_can_measure
from tests.messages import refused
from tests.train.conftest import REPOSITORY, command, run


# A run has 20 steps of 16 images out of 1,400, so k-NN is due after steps 8 and 16, and at the end.
def dense_of(scenes):
    """Dense k-NN on the scenes as they are, at the same steps."""
    sets = [f"eval.dense_{part}={scenes / 'val'}" for part in ("train", "val")]  # few images
    return ["eval.dense_every=0.09", *sets, "eval.dense_k=5", "eval.dense_size=0", "eval.dense_patches=400"]


KNN = ["eval.knn_every=0.09", "eval.knn_at_start=true", "eval.knn_k=5", "eval.knn_labels=10%"]


@pytest.mark.parametrize(
    "every, steps_per_epoch, num_steps, expected",
    [
        (1, 4, 10, [4, 8, 10]),
        (1, 2.5, 10, [3, 5, 8, 10]),
        (0.5, 4, 4, [2, 4]),
        (1 / 3, 3, 4, [1, 2, 3, 4]),
        (0.1, 4, 3, [1, 2, 3]),
        (9, 4, 7, [7]),
    ],
)
def test_it_is_due_at_the_first_step_after_each_multiple_and_at_the_end(
    every, steps_per_epoch, num_steps, expected
):
    optim, num_samples = SimpleNamespace(global_batch=2), int(2 * steps_per_epoch)
    schedule = Schedule(optim, num_steps, num_samples, accumulation=1, log_every=1)
    assert [step for step in range(1, num_steps + 1) if schedule.is_due(step, every=every)] == expected


@pytest.fixture(scope="module")
def two_runs(tiny_recipe, scenes, tmp_path_factory):
    """(with, without): run folders of the same 20 steps on one rank, with measurements and without."""
    folder = tmp_path_factory.mktemp("knn")
    recipes = [
        [*tiny_recipe, f"run.dir={folder / 'with'}", *KNN, *dense_of(scenes), "eval.loss_every=0.09"],
        [*tiny_recipe, f"run.dir={folder / 'without'}"],
    ]
    done = run([command([], ranks=1)[0], "-m", "tests.train.driver", json.dumps(recipes)], cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "with", folder / "without"


def test_it_does_not_change_training(two_runs):
    weights, plain = (load_file(path / "student.safetensors") for path in two_runs)
    assert all(torch.equal(weights[name], plain[name]) for name in plain) and set(weights) == set(plain)
    rows, plain = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in two_runs
    )
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain] and len(rows) == 20
    assert {row["step"] for row in rows if "knn/top1" in row} == {8, 16, 20}
    assert {row["step"] for row in rows if "dense/miou" in row} == {8, 16, 20}
    assert not any("knn/top1" in row or "dense/miou" in row for row in plain)
    assert not (two_runs[1] / "results.jsonl").exists()


def test_losses_on_data_val_are_measured_too(two_runs):
    rows = [json.loads(line) for line in (two_runs[0] / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row for row in rows if "val/loss" in row}
    assert set(measured) == {8, 16, 20}
    names = [name for name in rows[0] if name == "pixel" or name.startswith("align/")]
    assert len(names) == 2
    for row in measured.values():
        assert row["val/loss"] == pytest.approx(sum(row[f"val/{name}"] for name in names), rel=1e-5)
        assert row["val/loss"] == pytest.approx(row["loss"], rel=0.5) and row["val/loss"] != row["loss"]
    assert measured[20]["val/loss"] < measured[8]["val/loss"]
    assert read_record(two_runs[0]).losses == ["loss", *names]


@pytest.mark.parametrize("placement, has_ema", [("pipeline", False), ("zero3", False), (None, True)])
def test_losses_on_data_val_are_refused_where_they_would_change_training(placement, has_ema):
    replicated = NamedTeacherConfig(name="vit", weights="file").called("a")
    check_can_measure([replicated], has_ema=False)
    check_can_measure([], has_ema=False)
    other = NamedTeacherConfig(name="vit", weights="file").called("b")
    other = other.model_copy(update={"placement": placement or "replicated"})
    with refused("eval.loss_every", *(["teachers.b.placement"] if placement else [])) as error:
        check_can_measure([replicated, other], has_ema=has_ema)
    assert error.value.on_every_rank


def test_the_numbers_are_those_of_eval_knn_and_in_both_files(two_runs, capsys):
    from dmae_ds.evaluate.knn import evaluate_run

    rows = {
        row["step"]: row for row in map(json.loads, (two_runs[0] / "metrics.jsonl").read_text().splitlines())
    }
    start, *history = [result for result in read_history(two_runs[0]) if result["metric"] == "knn"]
    assert start["step"] == 0 and start["scores"] != history[-1]["scores"]
    assert [(result["step"], result["scores"]["top1"], result["scores"]["top5"]) for result in history] == [
        (step, rows[step]["knn/top1"], rows[step]["knn/top5"]) for step in (8, 16, 20)
    ]
    assert len({result["scores"]["top1"] for result in history}) > 1
    assert (two_runs[0] / "subsets" / "10%-seed0.txt").is_file()
    (again,) = evaluate_run(two_runs[0], ks=[5], labels="10%", cache_gib=0)
    assert without_times(again) == without_times(history[-1])


def without_times(result):
    return {name: value for name, value in result.items() if name not in ("seconds", "when")}


def test_dense_numbers_are_those_of_eval_dense_and_in_both_files(two_runs, scenes):
    from dmae_ds.evaluate.dense import KnnOptions, evaluate_run
    from dmae_ds.evaluate.source import find_sources

    rows = {
        row["step"]: row for row in map(json.loads, (two_runs[0] / "metrics.jsonl").read_text().splitlines())
    }
    history = [result for result in read_history(two_runs[0]) if result["metric"] == "dense_knn"]
    assert [(result["step"], result["scores"]["miou"]) for result in history] == [
        (step, rows[step]["dense/miou"]) for step in (8, 16, 20)
    ]
    assert len({result["scores"]["miou"] for result in history}) > 1
    data = [f"data.{part}={scenes / 'val'}" for part in ("train", "val")]
    (source,) = find_sources([str(two_runs[0]), *data])
    (again,) = evaluate_run(source, tasks=[KnnOptions(k=5, patches=400)], size=0)
    assert without_times(again) == without_times(history[-1])
    assert (
        read_record(two_runs[0]).losses[0] == "loss" and "dense/miou" not in read_record(two_runs[0]).losses
    )


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.val=null"], ["eval.knn_every 1", "data.val"]),
        (["data.val=null", "eval.knn_every=null", "eval.loss_every=1"], ["eval.loss_every", "data.val"]),
        (["eval.knn_k=500", "eval.knn_labels=10%"], ["eval.knn_k 500", "14", "eval.knn_labels 10%"]),
        (["eval.knn_labels=most"], ["labels", "most"]),
        (["eval.dense_every=2"], ["eval.dense_every 2", "data.train", "label maps"]),
        (["eval.dense_every=2", "eval.dense_train=nowhere"], ["eval.dense_every 2", "nowhere"]),
    ],
)
def test_what_it_could_not_measure_is_refused_before_training(tiny_recipe, tmp_path, overrides, words):
    config = load_config(
        tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", "eval.knn_every=1", *overrides]
    )
    with refused(*words):
        prepare(config, World(), resume="never")


def test_dense_during_training_reads_label_maps_and_no_boxes(tiny_recipe, scenes):
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], "run.dir=x", *dense_of(scenes)])
    rest = dict.fromkeys(("run_dir", "schedule", "engine", "metric_logger", "ranks"))
    for one in DenseDuringTraining(config.eval, config.data, config.student, **rest).sets:
        assert one.shard_set.dense.box_classes and one.info.map_classes and one.info.box_classes is None


def test_an_option_without_knn_every_is_refused(tiny_recipe):
    for option, needed in (
        ("knn_k=10", "knn_every"),
        ("dense_k=9", "dense_every"),
        ("memory_gib=2", "dense_every"),
        ("batch_size=9", "knn_every"),
    ):
        with refused(f"eval.{option.split('=')[0]}", f"eval.{needed}"):
            load_config(tiny_recipe[0], [*tiny_recipe[1:], "run.dir=x", f"eval.{option}"])
    load_config(tiny_recipe[0], [*tiny_recipe[1:], "run.dir=x", "eval.memory_gib=2", "eval.dense_every=1"])


def test_features_that_are_not_finite_end_the_run_in_one_line(monkeypatch):
    from dmae_ds.evaluate.frozen import FrozenFeatures
    from dmae_ds.train import knn

    broken = FrozenFeatures(
        torch.full((9, 4), torch.nan),
        torch.zeros(9, dtype=torch.int64),
        torch.ones(3, 4),
        torch.zeros(3, dtype=torch.int64),
        2,
        {},
    )
    measure = object.__new__(knn.KnnDuringTraining)
    measure.__dict__ |= {
        "config": load_config("digits_mae", ["data.train=x", "run.dir=x", "eval.knn_every=1"]).eval,
        "schedule": SimpleNamespace(is_due=lambda step, every: True),
        "ranks": knn.TrainingRanks(World(), torch.device("cpu"), precision="fp32"),
    }
    monkeypatch.setattr(knn.KnnDuringTraining, "_embed", lambda self, step: broken)
    with refused("k-NN", "step 2", "not finite", error=RunFailed) as error:
        with_ways_on(measure, "k-NN")(2)
    assert error.value.on_every_rank


@pytest.mark.slow
def test_two_ranks_with_sharded_weights_and_a_pipelined_teacher_do_not_change_either(
    tiny_recipe, scenes, tmp_path
):
    streamed = ["deepspeed=zero3", "teacher.placement=pipeline", "teacher.stages=2", "optim.micro_batch=4"]
    recipes = [
        [
            *tiny_recipe,
            *streamed,
            f"run.dir={tmp_path / 'with'}",
            *KNN,
            "eval.knn_labels=all",
            *dense_of(scenes),
        ],
        [*tiny_recipe, *streamed, f"run.dir={tmp_path / 'without'}"],
        [*tiny_recipe, "deepspeed=zero2", "precision=bf16", f"run.dir={tmp_path / 'bf16'}", *KNN],
    ]
    launcher = command([], ranks=2)[:-1]
    done = run([*launcher, "tests.train.driver", json.dumps(recipes)], cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    weights, plain = (load_file(tmp_path / name / "student.safetensors") for name in ("with", "without"))
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    history = read_history(tmp_path / "with")
    dense = [result for result in history if result["metric"] == "dense_knn"]
    assert [(result["step"], result["world_size"]) for result in dense] == [(8, 2), (16, 2), (20, 2)]
    history = [result for result in history if result["metric"] == "knn"]
    assert [result["step"] for result in history] == [0, 8, 16, 20]
    assert all(result["world_size"] == 2 and result["num_train"] == 1400 for result in history)
    from dmae_ds.evaluate.knn import evaluate_run

    (alone,) = evaluate_run(tmp_path / "with", ks=[5], cache_gib=0)
    assert alone["scores"]["top1"] == pytest.approx(
        history[-1]["scores"]["top1"], abs=0.26
    )  # one image of 397
    assert alone["settings"] == history[-1]["settings"]
    assert [result["settings"]["precision"] for result in read_history(tmp_path / "bf16")] == ["bf16"] * 4
