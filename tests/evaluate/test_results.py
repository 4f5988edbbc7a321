"""RUN/results.jsonl: lines are read back, the newest counts, and nothing incomplete or wrong is written."""

import json
import threading

import pytest

from dmae_ds.evaluate.results import (
    FIELDS,
    METRICS,
    MeasuredOn,
    append_result,
    headline,
    headline_score,
    interval_95,
    make_result,
    read_history,
    read_results,
    results_table,
)
from tests.evaluate.conftest import knn_result
from tests.messages import refused


def top1(results):
    return [result["scores"]["top1"] for result in results]


def test_the_newest_of_each_kind_counts_and_the_history_keeps_a_line_per_step(tmp_path):
    assert read_results(tmp_path) == read_history(tmp_path) == []
    lines = [
        knn_result(20.0, step=10),
        knn_result(30.0, step=20),
        knn_result(31.0, step=20, k=1),
        knn_result(29.0, step=20, labels="10%", subset_seed=0),
        knn_result(28.0, step=20, labels="10%", subset_seed=1),
        knn_result(25.0, step=10),
    ]
    for line in lines:
        append_result(tmp_path, line)
    results, history = read_results(tmp_path), read_history(tmp_path)
    assert top1(results) == [31.0, 29.0, 28.0, 25.0]  # the newest last
    assert [result["step"] for result in history] == [10, 20, 20, 20, 20]
    assert top1(history) == [25.0, 30.0, 31.0, 29.0, 28.0]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
    assert {name: results[0][name] for name in lines[2]} == lines[2]
    assert results[0]["when"].endswith("+00:00") and list(results[0]) == list(FIELDS)
    append_result(tmp_path, {**lines[0], "data": "other images"})
    assert top1(read_results(tmp_path)) == [31.0, 29.0, 28.0, 25.0, 20.0]
    append_result(tmp_path, {**lines[0], "val": "other images"})
    assert top1(read_results(tmp_path))[-2:] == [20.0, 20.0] and len(read_results(tmp_path)) == 6
    append_result(tmp_path, {**lines[0], "when": "2026-01-02T03:04:05+00:00"})
    assert read_results(tmp_path)[-1]["when"] == "2026-01-02T03:04:05+00:00"


@pytest.mark.parametrize(
    ("percent", "num_images", "expected"),
    # Wilson's interval without continuity correction: Newcombe 1998, Table I, and its limits at 0 and 1.
    [(100 * 81 / 263, 263, (25.53, 36.62)), (100 * 15 / 148, 148, (6.24, 16.05)), (0.0, 20, (0.0, 16.11))],
)
def test_the_interval_is_wilsons(percent, num_images, expected):
    assert interval_95(percent, num_images) == pytest.approx(expected, abs=0.01)
    low, high = interval_95(100 - percent, num_images)
    assert (100 - high, 100 - low) == pytest.approx(expected, abs=0.01)


def test_the_table_has_a_row_for_each_run_and_share_and_the_settings_that_differ():
    rows = [("runs/a", knn_result(20.0, k=1)), ("runs/b", knn_result(30.0, k=20))]
    rows += [("runs/b", knn_result(29.0, k=20, labels="10%", subset_seed=0))]
    heading, *lines = results_table(rows)
    assert heading.split()[:3] == ["run", "labels", "k"] and "temperature" not in heading
    assert [line.split()[:4] for line in lines] == [
        ["runs/a", "all", "1", "20.0%"],
        ["runs/b", "all", "20", "30.0%"],
        ["runs/b", "10%", "20", "29.0%"],
    ]
    dense = {**knn_result(0.0), "metric": "dense_knn", "scores": {"miou": 12.5}, "settings": {"window": 64}}
    linear = {**dense, "metric": "dense_linear", "settings": {"iterations": 9, "window": 64}}
    heading, *lines = results_table([("runs/a", dense), ("runs/a", linear), ("runs/b", dense)])
    assert "mIoU" in heading and not {"interval", "window", "iterations"} & set(heading.split())
    assert all("12.5%" in line for line in lines) and "linear segmentation" in lines[1]


def test_a_result_is_put_together_from_what_it_was_measured_on():
    expected = knn_result(20.0)
    fields = {name: expected[name] for name in MeasuredOn.__dataclass_fields__}
    made = make_result(
        MeasuredOn(**fields),
        metric="knn",
        scores={"top1": 20.0, "top5": None},
        settings=expected["settings"],
        seconds=expected["seconds"],
    )
    assert made == expected


def test_every_metric_has_a_headline_with_a_title_and_a_unit():
    for name, metric in METRICS.items():
        assert metric.headline in metric.scores and metric.title and headline_score(name).title
    assert (
        headline_score("knn").format(71.25) == "71.2%" and headline_score("knn").format(71.25, 2) == "71.25%"
    )


def test_a_metric_without_top1_is_written_and_read(tmp_path, segmentation):
    append_result(tmp_path, segmentation)
    append_result(tmp_path, knn_result(20.0))
    assert [headline(result) for result in read_results(tmp_path)] == [41.5, 20.0]
    assert headline_score("segmentation").title == "mIoU"
    for scores in ({"top1": 41.5}, {"miou": 141.5}):
        with refused("miou", error=ValueError):
            append_result(tmp_path, {**segmentation, "scores": scores})


def old_line(top1, top5, *, step):
    """A line of results.jsonl as earlier versions wrote it."""
    line = {**knn_result(0.0, step=step), "when": "2026-01-01T00:00:00+00:00"}
    del line["scores"], line["val"]
    return {"metric": line.pop("metric"), "top1": top1, "top5": top5, **line}


def test_lines_of_earlier_versions_are_read_and_stay_when_lines_are_added(tmp_path):
    old = [old_line(20.0, None, step=10), old_line(30.0, 90.0, step=20)]
    text = "".join(json.dumps(line) + "\n" for line in old)
    (tmp_path / "results.jsonl").write_text(text)
    assert [result["scores"] for result in read_history(tmp_path)] == [
        {"top1": 20.0},
        {"top1": 30.0, "top5": 90.0},
    ]
    assert set(read_results(tmp_path)[0]) == set(FIELDS) and headline(read_results(tmp_path)[0]) == 30.0
    append_result(tmp_path, {**knn_result(40.0, step=30), "scores": {"top1": 40.0, "top5": 95.0}})
    assert (tmp_path / "results.jsonl").read_text().startswith(text)
    assert top1(read_history(tmp_path)) == [20.0, 30.0, 40.0]
    append_result(tmp_path, {**knn_result(41.0, step=30), "val": "other images"})
    assert top1(read_results(tmp_path)) == [
        40.0,
        41.0,
    ]  # an old and a new line of one evaluation are one kind
    (tmp_path / "results.jsonl").write_text(text + json.dumps(old_line(None, None, step=30)) + "\n")
    with refused("line 3", "top1"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"metric": "guess"}, ("'guess'", *METRICS)),
        ({"scores": {"top1": 101}}, ("top1", 101)),
        ({"scores": {"top1": float("nan")}}, ("top1", "nan")),
        ({"scores": {"top1": None}}, ("top1", "None")),
        ({"scores": {"top1": True}}, ("top1", "True")),
        ({"scores": {"top1": 50.0, "top5": -1}}, ("top5", "-1")),
        ({"scores": {"top5": 90.0}}, ("top5", "top1")),
        ({"scores": {}}, ("top1", "top5")),
        ({"scores": {"top1": 50.0, "miou": 40.0}}, ("miou", "top1", "top5")),
        ({"scores": 50.0}, ("scores", 50.0)),
        ({"labels": "few"}, ("labels", "'few'")),
        ({"labels": "10%"}, ("subset_seed", "None")),
        ({"subset_seed": 3}, ("subset seed", 3)),
        ({"settings": {"k": [1]}}, ("settings.k", "[1]")),
        ({"step": 1.5}, ("step", 1.5)),
        ({"step": True}, ("step", "True")),
        ({"seconds": float("inf")}, ("seconds", "inf")),
        ({"top1": 20.0}, ("top1", *FIELDS)),
    ],
)
def test_what_is_not_a_result_is_not_written(tmp_path, change, words):
    append_result(tmp_path, knn_result(20.0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with refused(*words, error=ValueError):
        append_result(tmp_path, {**knn_result(20.0), **change})
    result = knn_result(20.0)
    del result["data"]
    with refused("data", error=ValueError):
        append_result(tmp_path, result)
    assert (tmp_path / "results.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_line_is_named(tmp_path):
    append_result(tmp_path, knn_result(20.0))
    whole = (tmp_path / "results.jsonl").read_text()
    wrong = {**read_results(tmp_path)[0], "scores": {"top1": 200}}
    for broken in ('{"metric": "knn"', "[]", json.dumps(wrong)):
        (tmp_path / "results.jsonl").write_text(whole + broken + "\n")
        with refused("line 2", tmp_path):
            read_results(tmp_path)


def test_evaluations_that_end_together_lose_no_line(tmp_path):
    writers = [
        threading.Thread(target=append_result, args=(tmp_path, knn_result(20.0, k=k))) for k in range(1, 25)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(result["settings"]["k"] for result in read_results(tmp_path)) == list(range(1, 25))
