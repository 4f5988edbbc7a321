"""Progress in a log file is a line for each report; on a terminal it is a bar."""

from __future__ import annotations

import io
import sys

import pytest

from dmae_ds.train.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("initial, shown_at", [(0, [5, 10]), (5, [10]), (9, [10])])
def test_in_a_log_file_each_report_is_a_line(monkeypatch, initial, shown_at):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress(total=10, initial=initial)
    for step in range(initial + 1, 11):
        progress.advance()
        if step in shown_at:
            progress.show({"loss": "0.5", "img/s": "12"})
    progress.close()
    text = sys.stderr.getvalue()
    assert text.endswith("\n") and "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == len(shown_at)
    for step, line in zip(shown_at, lines, strict=True):
        assert line.startswith(f"step {step} of 10 ({step * 10}%)") and "loss 0.5" in line and len(line) < 110


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(total=2, initial=0)
    for _ in range(2):
        progress.advance()
        progress.show({"loss": "0.5"})
    progress.close()
    assert "\r" in sys.stderr.getvalue() and "2/2" in sys.stderr.getvalue()


def test_a_resumed_run_without_steps_left_is_closed_quietly(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Progress(total=10, initial=10).close()
    assert sys.stderr.getvalue() == ""
