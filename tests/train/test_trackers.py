"""Trackers: W&B with a stand-in for its library that records what it is told; a login; what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.distributed.world import World
from dmae_ds.train import trackers
from dmae_ds.train.preflight import prepare
from dmae_ds.train.trackers import build_trackers, check_trackers, is_logged_in, project_of
from tests.messages import refused

STAND_IN = """
import json, os

def record(*call):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Config:
    def update(self, values, allow_val_change=False):
        record("config", values, allow_val_change)

class Run:
    def log(self, values, step=None):
        record("log", values, step)
    def finish(self):
        record("finish")

config = Config()
class UsageError(Exception):
    pass

def init(**kwargs):
    if "WANDB_REFUSES" in os.environ:
        raise UsageError("No API key configured.\\nUse `wandb login`")
    record("init", kwargs)
    return Run()
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Reads the recorded calls; a module `wandb` is importable, and the user has no login of it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CALLS", str(folder / "calls"))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    yield lambda: [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def start(config, run_dir, *, step):
    (tracker,) = build_trackers(config, run_dir, step=step)
    tracker.log({"loss": 0.5}, step=step + 1)
    tracker.finish()


def test_a_run_keeps_its_id_over_restarts_and_a_new_one_has_another(calls, tmp_path):
    run_dir = tmp_path / "mask90"
    run_dir.mkdir()
    config = load_config("digits_mae", ["log.trackers=[wandb]", "log.project=masks"])
    for step in (0, 20, 0):
        start(config, run_dir, step=step)
    recorded = calls()
    inits = [call[1] for call in recorded if call[0] == "init"]
    assert len(recorded) == 12 and len(inits) == 3
    assert inits[0]["id"] == inits[1]["id"] != inits[2]["id"] == (run_dir / trackers.ID_FILE).read_text()
    for init in inits:
        assert (init["project"], init["name"], init["resume"]) == ("masks", "mask90", "allow")
        assert init["dir"] == str(run_dir)
    _, values, may_change = recorded[1]
    assert values == config.model_dump(mode="json") and may_change
    assert recorded[6] == ["log", {"loss": 0.5}, 21] and recorded[7] == ["finish"]


def test_the_project_is_the_recipe_s_then_the_variable_s(calls, monkeypatch):
    def project(*overrides):
        return project_of(load_config("digits_mae", ["log.trackers=[wandb]", *overrides]).log)

    assert project() == trackers.PROJECT and project("log.project=a") == "a"
    monkeypatch.setenv("WANDB_PROJECT", "b")
    assert project() == "b" and project("log.project=a") == "a"
    with refused("log.project", "log.trackers"):
        load_config("digits_mae", ["log.project=a"])


def test_a_service_that_does_not_start_is_one_line(calls, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_REFUSES", "1")
    with refused("log.trackers", "No API key", "wandb login", "WANDB_MODE=offline"):
        build_trackers(load_config("digits_mae", ["log.trackers=[wandb]"]), tmp_path, step=0)


def test_a_login_is_a_key_a_file_or_none_needed(calls, monkeypatch, tmp_path):
    assert not is_logged_in()
    (tmp_path / "site" / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not is_logged_in()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert is_logged_in()


def test_without_the_library_a_run_is_refused_before_it_starts(monkeypatch, tiny_recipe, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe, *overrides = tiny_recipe
    config = load_config(recipe, [*overrides, "log.trackers=[wandb]", f"run.dir={tmp_path / 'run'}"])
    with refused("log.trackers", "wandb", "dmae-ds[wandb]"):
        prepare(config, World(), resume="never")
    assert not (tmp_path / "run").exists()
    check_trackers(load_config(recipe, overrides).log)
