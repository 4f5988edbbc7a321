"""The record of a run folder, and the facts and warnings that are made of it."""

import math
from dataclasses import replace

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.evaluate.facts import find_collapses, find_dead_terms, list_facts
from dmae_ds.evaluate.record import read_record
from dmae_ds.evaluate.results import append_result
from dmae_ds.objectives.build import build_objective
from tests.evaluate.conftest import Metrics, knn_result, make_run
from tests.messages import refused

# Runs of BENCHMARKS.md, "When features have collapsed": recipe, (effective rank at the first step, at the
# end), (spread at the first step, at the end), and whether the student was spoiled. Shapes: three classes.
MEASURED = {
    "digits, mae": ("digits_mae", (4.3, 8.77), (0.039, 0.26), False),
    "digits, dmae": ("digits_dmae", (4.3, 7.77), (0.039, 0.33), False),
    "digits, sdae": ("digits_sdae", (4.3, 5.68), (0.039, 0.0046), False),
    "digits, mae, rate x 50": ("digits_mae", (4.3, 1.15), (0.039, 0.012), True),
    "digits, dmae, rate x 50": ("digits_dmae", (4.3, 2.37), (0.039, 0.0001), True),
    "digits, mocov3": ("digits_mocov3", (2.4, 6.21), (0.02, 0.0043), False),
    "digits, mocov3 with dmae's term": ("digits_mocov3_dmae", (2.4, 7.3), (0.02, 0.066), False),
    "shapes, mae": ("digits_mae", (2.9, 5.97), (0.084, 0.32), False),
    "shapes, dmae": ("digits_dmae", (2.9, 6.84), (0.084, 0.33), False),
    "shapes, mocov3": ("digits_mocov3", (3.0, 3.03), (0.056, 0.041), False),
    "shapes, mae, rate x 50": ("digits_mae", (2.9, 2.05), (0.084, 0.0021), True),
    "shapes, dmae, rate x 50": ("digits_dmae", (2.9, 2.16), (0.084, 0.0006), True),
}


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


# (share of the gradient, distance at the first step, at the end), and whether the term is dead: BENCHMARKS.md
TERMS = {
    "dmae": (0.727, 4.09, 1.20, False),
    "mocov3 with dmae's term": (0.036, 4.16, 1.18, False),
    "dmae as published": (0.051, 0.0981, 0.0375, False),
    "dmae, alpha .02": (0.048, 1.0, 0.47, True),
    "dmae, rate x 50": (0.0, 4.09, 3.48, True),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_of_a_student_that_imitates_is_not_dead(run, name):
    share, first, last, is_dead = TERMS[name]
    record = read_record(run)
    for row in record.rows:
        row |= {"share/1": share, "align/1-3": last if row["step"] > 1 else first}
    assert len(find_dead_terms(record, name)) == is_dead
    del record.rows[0]["align/1-3"]  # of an older run, or a run whose first lines are lost
    assert len(find_dead_terms(replace(record, rows=record.rows[1:]), name)) == (share < 0.05)


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


def test_the_initial_student_is_named_next_to_the_last_one(run):
    assert read_record(run).knn_at_start is None
    append_result(run, knn_result(31.5, step=0))
    append_result(run, knn_result(45.0, step=0, k=5))
    assert read_record(run).knn_at_start["scores"] == {"top1": 45.0}
    append_result(run, knn_result(62.0))
    record = read_record(run)
    assert record.knn_at_start["scores"] == {"top1": 31.5} and record.knn["scores"] == {"top1": 62.0}
    fact = list_facts(record, *build_objective(record.config))["k-NN top-1"]
    assert "62.0%" in fact.text and "31.5%" in fact.note


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
    assert facts["effective rank of the mean of the patch tokens"] == ("9.0", "6.0 at the first step")
    old = read_record(make_run(tmp_path / "old", train=shards[0], val=shards[1], metrics=Metrics(rank=None)))
    facts = list_facts(old, *build_objective(old.config))
    assert old.seconds() == {} and facts["images/s, median"].note == ""
    assert not any("effective rank" in name for name in facts) and find_collapses(old, "old") == []


@pytest.mark.parametrize(
    "rank, num_steps, collapsed", [(2.9, 30, True), (3.1, 30, False), (1.0, 20, True), (1.0, 19, False)]
)
def test_a_fallen_rank_is_a_collapse_from_two_thirds_of_the_run_on(
    tmp_path, shards, rank, num_steps, collapsed
):
    """The rank with the initial weights is 6."""
    record = read_record(
        make_run(
            tmp_path / "run", train=shards[0], val=shards[1], metrics=Metrics(rank=rank, num_steps=num_steps)
        )
    )
    sentences = find_collapses(record, "mine")
    assert len(sentences) == collapsed
    if collapsed:
        assert all(word in sentences[0] for word in ("mine", f"{rank:.1f}", "6.0", "optim.base_lr"))
    not_measured = [{key: value for key, value in record.rows[0].items() if "rank/" not in key}]
    assert find_collapses(replace(record, rows=not_measured + record.rows[1:]), "older") == []


@pytest.mark.parametrize("name", MEASURED)
def test_the_alarm_is_true_for_the_runs_that_were_measured(run, name):
    recipe, ranks, spreads, is_collapsed = MEASURED[name]
    record, objective = read_record(run), load_config(recipe).objective
    for row in record.rows:
        is_later = row["step"] > 1
        for tokens in ("mean", "cls"):
            row |= {f"rank/{tokens}": ranks[is_later], f"spread/{tokens}": spreads[is_later]}

    def judged(objective):
        config = record.config.model_copy(update={"objective": objective})
        return find_collapses(replace(record, config=config), name)

    assert len(judged(objective)) == is_collapsed
    # Where labels are learned, images of one class are meant to be alike.
    assert judged(load_config("digits_g2sd_specific").objective) == []


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
