"""RUN/results.jsonl: what is written is read back, the newest counts, and nothing half or wrong gets in."""

import json
import threading

import pytest

from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import FIELDS, append_result, read_history, read_results
from tests.evaluate.conftest import knn_result


def test_the_newest_of_each_kind_counts_and_the_history_keeps_a_line_a_step(tmp_path):
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
    assert [result["top1"] for result in read_results(tmp_path)] == [
        31.0,
        29.0,
        28.0,
        25.0,
    ]  # the newest last
    assert [(result["step"], result["top1"]) for result in read_history(tmp_path)] == [
        (10, 25.0),
        (20, 30.0),
        (20, 31.0),
        (20, 29.0),
        (20, 28.0),
    ]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
    (first, *_), when = read_results(tmp_path), "2026-01-02T03:04:05+00:00"
    assert (
        {name: first[name] for name in lines[2]} == lines[2]
        and first["when"].endswith("+00:00")
        and list(first) == list(FIELDS)
    )
    append_result(tmp_path, {**lines[0], "when": when})
    assert read_results(tmp_path)[-1]["when"] == when


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metric": "guess"}, "metric is 'guess'"),
        ({"top1": 101}, "top1 is 101"),
        ({"top1": float("nan")}, "top1 is nan"),
        ({"top1": None}, "top1 is None"),
        ({"top5": -1}, "top5 is -1"),
        ({"labels": "few"}, "labels 'few'"),
        ({"labels": "10%"}, "subset_seed is None"),
        ({"subset_seed": 3}, "subset seed 3"),
        ({"settings": {"k": [1]}}, "settings.k"),
        ({"step": 1.5}, "step is 1.5"),
        ({"step": True}, "step is True"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"extra": 1}, "expected the fields"),
    ],
)
def test_what_is_no_result_is_not_written(tmp_path, change, message):
    append_result(tmp_path, knn_result(20.0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        append_result(tmp_path, {**knn_result(20.0), **change})
    result = knn_result(20.0)
    del result["data"]
    with pytest.raises(ValueError, match="expected the fields"):
        append_result(tmp_path, result)
    assert (tmp_path / "results.jsonl").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_line_is_named(tmp_path):
    append_result(tmp_path, knn_result(20.0))
    for broken in ('{"metric": "knn"', "[]", json.dumps({**read_results(tmp_path)[0], "top1": 200})):
        (tmp_path / "results.jsonl").write_text(
            (tmp_path / "results.jsonl").read_text().splitlines()[0] + "\n" + broken + "\n"
        )
        with pytest.raises(UserError, match="line 2 is no result") as error:
            read_results(tmp_path)
        assert "\n" not in str(error.value)


def test_evaluations_that_end_together_lose_no_line(tmp_path):
    writers = [
        threading.Thread(target=append_result, args=(tmp_path, knn_result(20.0, k=k))) for k in range(1, 25)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(result["settings"]["k"] for result in read_results(tmp_path)) == list(range(1, 25))
