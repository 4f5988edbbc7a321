"""The table of licences says what the installed timm says of the tags that it names."""

from __future__ import annotations

import re
from pathlib import Path

import timm

PAGE = Path(__file__).resolve().parents[2] / "dmae_ds" / "weights" / "LICENCES.md"


def test_the_table_agrees_with_timm():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if "timm, `" in line]
    wrong, num_tags = [], 0
    for _, licence, commercial, source in rows:
        for tag in re.findall(r"`(\w+\.\w+)`", source):
            num_tags += 1
            known = timm.get_pretrained_cfg(tag).license
            if not licence.strip().lower().replace(" ", "-").startswith(known):
                wrong.append(f"{tag}: {licence.strip()}, timm {known}")
            if "-nc-" in known and commercial.strip() != "no":
                wrong.append(f"{tag}: {commercial.strip()}, timm {known}")
    assert len(rows) > 8 and num_tags > 10 and not wrong
