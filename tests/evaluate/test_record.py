"""The record of a run folder, and the facts and warnings that are made of it."""

import math
from dataclasses import replace

import pytest

from dmae_ds.evaluate.facts import find_collapses, find_dead_terms, list_facts
from dmae_ds.evaluate.record import read_record
from dmae_ds.evaluate.results import append_result
from dmae_ds.objectives.build import build_objective
from tests.evaluate.conftest import Metrics, knn_result, make_run
from tests.messages import refused


def test_an_incomplete_line_of_a_killed_run_is_left_out(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    record = read_record(run)
    assert record.column("step") == list(range(1, 31))
    assert record.losses == ["loss", "pixel", "align/1-3"]
    assert record.named("share/") == ["share/1"] and record.knn is None


def test_the_mean_of_the_last_tenth_leaves_out_values_that_are_not_finite(run):
    record = read_record(run)
    assert record.last_tenth("step") == 29  # of 30: the mean of 28, 29, 30
    assert replace(record, rows=record.rows[:1]).last_tenth("step") == 1
    record.rows[-1]["pixel"] = math.nan
    assert record.last_tenth("pixel") == pytest.approx((1 / 28 + 1 / 29) / 2)
    assert math.isnan(replace(record, rows=record.rows[-1:]).last_tenth("pixel"))


def test_a_folder_without_a_run_or_without_metrics_is_refused(tmp_path, run):
    with refused(tmp_path, "run folder"):
        read_record(tmp_path)
    for content in ("", '{"step": 1'):
        (run / "metrics.jsonl").write_text(content)
        with refused(run, "metrics", "log.every_steps", 20):
            read_record(run)
    (run / "metrics.jsonl").unlink()
    with refused(run, "metrics"):
        read_record(run)


@pytest.mark.parametrize("share, dead", [(0.02, True), (0.049, True), (0.051, False), (0.9, False)])
def test_a_term_below_a_twentieth_of_the_gradient_is_called_dead(tmp_path, shards, share, dead):
    record = read_record(
        make_run(tmp_path / "run", train=shards[0], val=shards[1], metrics=Metrics(share=share))
    )
    sentences = find_dead_terms(record, "mine")
    assert len(sentences) == dead
    if dead:
        assert all(word in sentences[0] for word in ("mine", "block 1", f"{share:.1%}", "objective.alpha"))
    facts = list_facts(record, *build_objective(record.config))
    assert facts["share of distillation, block 1"] == (f"{share:.1%}", "dead term" if dead else "")


@pytest.mark.parametrize("normalize, advised", [("l2", True), ("none", False)])
def test_raw_features_are_advised_unless_they_are_used_already(tmp_path, shards, normalize, advised):
    record = read_record(
        make_run(
            tmp_path / "run", train=shards[0], val=shards[1], metrics=Metrics(share=0.02), normalize=normalize
        )
    )
    assert ("objective.normalize=none" in find_dead_terms(record, "mine")[0]) == advised


def test_a_share_that_is_nearly_zero_only_at_the_end_is_dead(run):
    record = read_record(run)
    for row in record.rows[-3:]:
        row["share/1"] = 0.01
    assert len(find_dead_terms(record, "mine")) == 1


def test_facts_describe_the_run(run, tmp_path, shards):
    record = read_record(run)
    facts = list_facts(record, *build_objective(record.config))
    assert facts["k-NN top-1"] == ("not measured", f"dmae-ds eval knn {run}")
    assert facts["objective"].text == "dmae" and "block 1 <- 3" in facts["objective"].note
    assert facts["teacher"].note.startswith("cut after block 3 of 4; fp32")
    assert facts["steps"] == ("30", "9 of 9 epochs, 6 images a step")
    assert facts["images/s, median"].text == "101"
    assert facts["DeepSpeed, precision"].text == "zero1, fp32"
    assert facts["align/1-3 at the end"].text == "2.0000"
    assert facts["pixel at the end"].text == f"{(1 / 28 + 1 / 29 + 1 / 30) / 3:.4f}"
    alone = read_record(make_run(tmp_path / "mae", train=shards[0], val=shards[1], objective="mae"))
    facts = list_facts(alone, *build_objective(alone.config))
    assert facts["pixel at the end"].note == ""
    other = read_record(
        make_run(tmp_path / "norm", train=shards[0], val=shards[1], objective="mae", norm_pix=True)
    )
    assert "not comparable" in list_facts(other, *build_objective(other.config))["pixel at the end"].note
    assert facts["teacher"] == ("none", "") and not any("distillation" in question for question in facts)


@pytest.mark.parametrize("step, words", [(30, "step 30"), (20, "measured at step 20, before the last")])
def test_a_knn_of_an_older_student_is_marked(run, step, words):
    append_result(run, knn_result(71.25, step=step))
    record = read_record(run)
    fact = list_facts(record, *build_objective(record.config))["k-NN top-1"]
    assert fact == ("71.2%", f"k 20, T 0.07, mean pool; 1,400 train, 397 val; {words}")


def test_columns_that_only_some_steps_have_keep_their_epochs(run):
    record = read_record(run)
    assert record.named("norm/") == ["norm/1", "norm/2"] and record.named("rank/") == [
        "rank/cls",
        "rank/mean",
    ]
    assert (record.epochs("norm/1"), record.column("norm/1")) == ([3, 6, 9], [20, 30, 40])
    assert record.last_tenth("norm/1") == 40
    assert replace(record, rows=[{"norm/12": 1, "norm/3": 1}]).named("norm/") == ["norm/3", "norm/12"]


def test_the_time_of_a_step_is_the_median_of_its_parts_and_empty_without_measurements(run, tmp_path, shards):
    record = read_record(run)
    record.rows[0]["seconds/data"] = 1e6  # the first step waits for the workers
    assert record.seconds() == {"data": 0.01, "teacher": 0.03, "rest": 0.06}
    facts = list_facts(record, *build_objective(record.config))
    assert facts["images/s, median"].note == "0.1 s a step: data 10%, teacher 30%, rest 60%"
    assert facts["effective rank of the mean of the patch tokens"] == ("9.0", "")
    old = read_record(make_run(tmp_path / "old", train=shards[0], val=shards[1], metrics=Metrics(rank=None)))
    facts = list_facts(old, *build_objective(old.config))
    assert old.seconds() == {} and facts["images/s, median"].note == ""
    assert not any("effective rank" in name for name in facts) and find_collapses(old, "old") == []


@pytest.mark.parametrize(
    "rank, num_steps, collapsed", [(2.9, 30, True), (3.1, 30, False), (1.0, 20, True), (1.0, 19, False)]
)
def test_a_low_rank_is_a_collapse_from_two_thirds_of_the_run_on(tmp_path, shards, rank, num_steps, collapsed):
    record = read_record(
        make_run(
            tmp_path / "run", train=shards[0], val=shards[1], metrics=Metrics(rank=rank, num_steps=num_steps)
        )
    )
    sentences = find_collapses(record, "mine")
    assert len(sentences) == collapsed
    if collapsed:
        assert all(word in sentences[0] for word in ("mine", f"{rank:.1f}", "optim.base_lr"))


def test_other_results_are_facts(run, segmentation):
    append_result(run, segmentation)
    settings = {"recipe": "mae", "epochs": 100, "note": None}
    finetuned = knn_result(50.0, labels="10%", subset_seed=0)
    append_result(run, {**finetuned, "metric": "finetune", "settings": settings})
    append_result(run, knn_result(71.25))
    record = read_record(run)
    facts = list_facts(record, *build_objective(record.config))
    assert facts["k-NN top-1"].text == "71.2%"
    expected = ("50.0%", "recipe mae, epochs 100; step 30")
    assert facts["fine-tuned top-1, 10% of the labels"] == expected
    assert facts["linear segmentation mIoU"] == ("41.5%", "recipe voc; step 30")
