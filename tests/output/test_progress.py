"""Progress in a log file is a line for each report; on a terminal it is a bar."""

from __future__ import annotations

import ast
import io
import math
import sys
import time
from pathlib import Path

import pytest

from dmae_ds.output import lines, progress
from dmae_ds.output.lines import say
from dmae_ds.output.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("every_s, lines", [(0.0, [4, 8, 10]), (1e6, []), (math.inf, [])])
def test_a_command_without_reports_prints_a_line_now_and_then(monkeypatch, every_s, lines):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(total=10, unit="img", title="val features", every_s=every_s) as bar:
        for count in (4, 4, 2):
            bar.advance(count)
    printed = sys.stderr.getvalue().splitlines()
    assert len(printed) == len(lines) and "\r" not in sys.stderr.getvalue()
    for line, step in zip(printed, lines, strict=True):
        assert f" val features: img {step} of 10 ({step * 10}%)" in line and len(line) < 110


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_what_is_not_shown_prints_nothing(monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr())
    with Progress(total=10, every_s=0.0, is_shown=False) as bar:
        bar.advance()
        bar.show({"loss": "0.5"})
    assert sys.stderr.getvalue() == "" and bar.step == 1


def test_every_other_bar_is_silent_in_a_log_file():
    for path in [*(REPOSITORY / "dmae_ds").rglob("*.py"), *(REPOSITORY / "data_prep").rglob("*.py")]:
        if path == Path(progress.__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "tqdm":
                assert "disable" in [keyword.arg for keyword in node.keywords], f"{path}:{node.lineno}"


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
