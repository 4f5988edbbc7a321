"""Signals to a run: the first Ctrl-C is a request, as SIGTERM is; a second one ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from dmae_ds.cli.main import main
from dmae_ds.config.run import CheckpointConfig
from dmae_ds.train import stop
from dmae_ds.train.checkpoint import save
from dmae_ds.train.checkpoint.folder import CheckpointFolder
from tests.train.conftest import command, environment
from tests.train.test_resume import wait_for_step

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_a_request_and_repeated_by_a_launcher_it_is_the_same_one(number, capfd):
    request = stop.StopRequest()
    assert not request
    for _ in range(3):
        signal.raise_signal(number)
        assert request
    text = capfd.readouterr().err
    assert text.count("dmae-ds: ") == (number == signal.SIGINT)


def test_a_second_ctrl_c_ends_the_process(monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number))))
    monkeypatch.setattr(stop, "SAME_CTRL_C_S", -1.0)
    stop.StopRequest()
    signal.raise_signal(signal.SIGINT)
    assert not ended
    signal.raise_signal(signal.SIGINT)
    assert ended == [(os.getpid(), signal.SIGINT, signal.SIG_DFL)]
    assert "--resume auto" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = stop.StopRequest()
    signal.raise_signal(signal.SIGINT)
    assert not request


def test_ctrl_c_in_any_command_is_one_line_and_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("dmae_ds.cli.plan._plan", interrupted)
    assert main(["plan", "digits_dmae"]) == 130
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize(("minutes", "first", "later"), [(30, 5, 30), (2, 2, 2), (None, None, None)])
def test_the_first_save_comes_early(monkeypatch, tmp_path, minutes, first, later):
    now = 0.0
    monkeypatch.setattr(save.time, "monotonic", lambda: now)
    config = CheckpointConfig(every_minutes=minutes)
    checkpoints = save.Checkpoints(
        CheckpointFolder(tmp_path), config, identity={}, student_metadata={"": {}}, ema=None
    )
    for expected in (first, later):
        if expected is not None:
            now = 60 * expected - 1
            assert not checkpoints.due_by_time()
        now = 60 * (expected or 1000) + 1
        assert checkpoints.due_by_time() == (expected is not None)
        checkpoints._last_step, checkpoints._last_save_s, now = 10, 0.0, 0.0


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_saves_and_resumes(tiny_recipe, tmp_path):
    """A terminal sends SIGINT to the whole group: the rank and its loader's workers."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = ["optim.epochs=20", "log.every_steps=1", f"run.dir={run_dir}", "--resume", "auto"]
    arguments = command(["train", *tiny_recipe, *more], ranks=1)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env=environment(),
            stdout=file,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    wait_for_step(run_dir, 5, process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == os.EX_TEMPFAIL, log.read_text()
    latest = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()
    assert json.loads((latest / "state.json").read_text())["step"] >= 5
    assert "Traceback" not in log.read_text()
