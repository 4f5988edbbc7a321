"""The page that helps to choose an objective names all of them, and its numbers are the papers' and ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dmae_ds.config.shipped import shipped_objectives

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "dmae_ds" / "objectives" / "WHICH.md"


def test_every_objective_is_named_and_every_number_is_known():
    lines = PAGE.read_text().splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ") and not line.startswith("| you")]
    assert len(rows) > 15 and all(len(row) == 3 for row in rows)
    chosen = " ".join(row[1] for row in rows)
    assert not [name for name in shipped_objectives() if f"`{name}`" not in chosen]
    published = json.loads((REPOSITORY / "dmae_ds" / "report" / "published.json").read_text())["results"]
    known = {f"{value:.1f}" for row in published for value in row.values() if isinstance(value, float)}
    ours = (REPOSITORY / "RESULTS.md").read_text() + (REPOSITORY / "BENCHMARKS.md").read_text()
    known |= set(re.findall(r"\d+\.\d", ours))
    told = {number for row in rows for number in re.findall(r"(?<![\d.])\d\d\.\d\b", row[2])}
    assert len(told) > 30 and not told - known
