"""The log that a run keeps: what is printed, whatever stderr is, and what ended the run."""

from __future__ import annotations

import io
import os
import sys

import pytest

from dmae_ds.errors import Requeue, UserError
from dmae_ds.output import lines
from dmae_ds.output.lines import keep_log, log, say
from dmae_ds.output.progress import Progress
from dmae_ds.train.run_log import LOG, begin_log, log_until_end
from tests.output.test_progress import Terminal


def report_once(folder):
    with log_until_end():
        begin_log(folder)
        say("summary", dated=False)
        bar = Progress(total=4)
        for _ in range(4):
            bar.advance()
        bar.show({"loss": "0.5"})
        bar.close()


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_a_log_has_the_lines_also_of_a_terminal_and_of_a_quiet_run(monkeypatch, tmp_path, stderr, quiet):
    monkeypatch.setattr(sys, "stderr", stderr())
    monkeypatch.setattr(lines, "_quiet", quiet)
    for starts in (1, 2):
        report_once(tmp_path)
        say("after the end")
        kept = (tmp_path / LOG).read_text().splitlines()
        assert len(kept) == 3 * starts and kept[-2] == "summary"
        assert "step 4 of 4" in kept[-1] and "loss 0.5" in kept[-1] and kept[-1][:2] == "20"
    if stderr is io.StringIO:
        assert ("step 4 of 4" in sys.stderr.getvalue()) != quiet


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("too large"), ["dmae-ds: error: too large"]),
        (Requeue("after step 3"), ["dmae-ds: stopped: after step 3"]),
        (ZeroDivisionError("own code"), ["Traceback", "raise error", "ZeroDivisionError: own code"]),
    ],
)
def test_what_ends_a_run_is_the_end_of_its_log(tmp_path, error, words):
    with pytest.raises(type(error)), log_until_end():
        begin_log(tmp_path)
        raise error
    text = (tmp_path / LOG).read_text()
    assert all(word in text for word in words) and text.endswith(f"{error}\n")


def test_a_log_that_cannot_be_written_ends_with_one_warning(monkeypatch, tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with log_until_end():
        keep_log("/dev/full")
        log("first")
        log("second")
    assert capsys.readouterr().err.count("WARNING") == 1
