"""data_prep/{bench,timing}.py: sections and images that are chosen; rows take turns; medians of ratios."""

import pytest
import torch

from data_prep import bench, bench_reading
from data_prep.timing import Row, Section, Timing, format_table, time_interleaved
from dmae_ds.data import transforms


def test_rows_take_turns_and_are_prepared_before():
    calls = []
    rows = [
        Row(name, lambda name=name: calls.append(name), lambda name=name: calls.append(name.upper()))
        for name in "ab"
    ]
    timings = time_interleaved(rows, 3)
    assert calls == ["A", "a", "B", "b"] * 3
    assert {name: len(rounds) for name, rounds in timings.items()} == {"a": 3, "b": 3}


def test_table_gives_medians_of_ratios_within_a_round():
    section = Section("reading", "images", 100, [Row("first", lambda: None), Row("second", lambda: None)])
    timings = {
        "first": [Timing(1, 1), Timing(10, 1), Timing(2, 1)],
        "second": [Timing(0.5, 4), Timing(5, 4), Timing(1, 4)],
    }
    lines = format_table(section, timings).splitlines()
    assert lines[0] == "reading (100 images, median of 3 rounds)"
    assert lines[2].split() == ["first", "50", "10000.0", "1.00", "1.00"]
    assert lines[3].split() == ["second", "100", "40000.0", "2.00", "0.25"]


@pytest.mark.parametrize(
    "only, limit, expected",
    [
        (None, 5, ["conversion", "reading", "decoding"]),
        ("reading", 5, ["reading"]),
        ("conversion", 12, ["conversion"]),
    ],
)
def test_the_named_section_or_all_run_on_some_images(
    src, tmp_path, monkeypatch, capsys, only, limit, expected
):
    calls = []

    def section(name):
        def build(images, scratch):
            files = [path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
            assert (images == src) == (limit == 12)
            assert limit == 12 or (len(files) == 5 and len({path.parent for path in files}) == 2)
            return Section(name, "images", limit, [Row("first", lambda: calls.append(name))])

        return build

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(bench, "conversion", section("conversion"))
    monkeypatch.setattr(
        bench,
        "load_sections",
        lambda: {name: section(name) for name in ("conversion", "reading", "decoding")},
    )
    bench.run_bench(src, limit=limit, rounds=2, scratch=tmp_path / "scratch", only=only)
    assert calls == [name for name in expected for _ in range(2)]
    assert capsys.readouterr().out.count("median of 2 rounds") == len(expected)
    assert not list((tmp_path / "scratch").iterdir())


def test_all_ways_of_decoding_crop_the_same_shares_of_an_image(src, tmp_path, monkeypatch):
    scales = []
    monkeypatch.setattr(bench_reading, "_make", lambda *_: None)
    monkeypatch.setattr(bench_reading, "_bytes_of", lambda _: [(src / "bee" / "0.jpg").read_bytes()])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for name, key in (("crop_box", "scale"), ("train_view", "crop_scale")):
        way = getattr(transforms, name)
        monkeypatch.setattr(
            transforms,
            name,
            lambda *args, way=way, key=key, **how: scales.append(how[key]) or way(*args, **how),
        )
    for row in bench_reading.decoding(src, tmp_path).rows:
        row.run()
    assert scales == [(0.2, 1.0)] * 4  # two ways, with large and small images
