"""Progress in a log file is a line for each report; on a terminal it is a bar."""

from __future__ import annotations

import io
import sys
import time

import pytest

from dmae_ds.output import lines
from dmae_ds.output.lines import say
from dmae_ds.train import progress
from dmae_ds.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("initial, shown_at", [(0, [5, 10]), (5, [10]), (9, [10])])
def test_in_a_log_file_each_report_is_a_line(monkeypatch, initial, shown_at):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = Progress(total=10, initial=initial)
    for step in range(initial + 1, 11):
        bar.advance()
        if step in shown_at:
            bar.show({"loss": "0.5", "img/s": "12"})
    bar.close()
    text = sys.stderr.getvalue()
    assert text.endswith("\n") and "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == len(shown_at)
    for step, line in zip(shown_at, lines, strict=True):
        day, clock, text = line.split(" ", 2)
        time.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S")
        assert text.startswith(f"step {step} of 10 ({step * 10}%)") and "loss 0.5" in text and len(line) < 110


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = Progress(total=2, initial=0)
    for _ in range(2):
        bar.advance()
        bar.show({"loss": "0.5"})
    bar.close()
    say("saved a checkpoint")
    assert "\r" in sys.stderr.getvalue() and "2/2" in sys.stderr.getvalue()
    assert "\nsaved a checkpoint\n" in sys.stderr.getvalue()  # no date, and not behind the bar


def test_a_slow_run_is_late_for_its_next_line(monkeypatch):
    now = 0.0
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = Progress(total=10, initial=0)
    bar.advance()
    assert not bar.is_late()
    now = progress.LINE_EVERY_S + 1
    assert bar.is_late()
    bar.show({"loss": "1"})
    assert not bar.is_late()


def test_quiet_leaves_out_lines_and_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(lines, "_quiet", False)
    lines.be_quiet()
    bar = Progress(total=2, initial=0)
    bar.advance()
    bar.show({"loss": "0.5"})
    bar.close()
    say("saved a checkpoint")
    assert sys.stderr.getvalue() == ""
    say("WARNING", always=True)
    assert sys.stderr.getvalue() == "WARNING\n"


def test_a_resumed_run_without_steps_left_is_closed_quietly(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Progress(total=10, initial=10).close()
    assert sys.stderr.getvalue() == ""
