"""A plugin of pytest that writes down each check as it ends, and leaves out what has passed before.

pytest -p tests.gpu.record ...      with GPU_CHECK_OUT=folder; launch/gpu_check.sh starts it

A check is a test. Its line of correctness.jsonl has the name, the outcome, the seconds, the first line of a
failure, and what the test measured (`record_property`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FILE = Path(os.environ["GPU_CHECK_OUT"]) / "correctness.jsonl"


def pytest_collection_modifyitems(config, items):
    passed = {line["check"] for line in _lines() if line["outcome"] == "passed"}
    again = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = again


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
        return
    line = {
        "check": item.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "reason": "" if call.excinfo is None else str(call.excinfo.value).split("\n")[0][:200],
        "measured": dict(report.user_properties),
    }
    with open(FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # all have passed before
        session.exitstatus = pytest.ExitCode.OK


def _lines() -> list[dict]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
