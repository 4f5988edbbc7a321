"""data_prep/timing.py: rows take turns, and the figures of a table are medians of ratios."""

from data_prep.timing import Row, Section, Timing, format_table, time_interleaved


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
