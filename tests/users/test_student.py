"""A student who ablates the method and tries an objective of her own, from the READMEs' commands alone."""

from __future__ import annotations

import pytest

from tests.users.conftest import SMALL, TEACHER, json_lines, save_teacher

pytestmark = pytest.mark.slow
OWN = """
from typing import ClassVar, Literal

from dmae_ds.config.objective_base import FeatureDistillationConfig
from dmae_ds.config.objectives import MaskedPixels
from dmae_ds.objectives.dmae import Dmae


class Halved(Dmae):
    class Config(FeatureDistillationConfig, MaskedPixels):
        needs_teacher: ClassVar[bool] = True
        name: Literal["my:Halved"]

        @property
        def distillation(self):
            return self

    def forward(self, batch, features):
        losses = super().forward(batch, features)
        return losses | {"loss": losses["loss"] * 0.5}
"""


def test_ablation_and_an_own_objective(shell, digits, monkeypatch):
    folder = shell.folder
    save_teacher(folder / "teacher.safetensors")
    (folder / "my.py").write_text(OWN)
    names = {line.split()[0] for line in shell("dmae-ds recipes").splitlines() if line.strip()}
    assert {"digits_dmae", "dmae_vit_large_to_base"} <= names
    assert "teacher" in shell("dmae-ds recipes digits_dmae")
    assert "objective.alpha" in shell("dmae-ds recipes --all alpha")
    data = [f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]
    common = ["teacher.weights=teacher.safetensors", "teacher.format=timm", *TEACHER, *SMALL, *data]

    # A dry run shows the summary and leaves nothing.
    shell("dmae-ds train digits_dmae run.dir=runs/dry --dry-run", *common)
    assert not (folder / "runs" / "dry").exists()

    # A typo is one line that offers the key.
    assert "objective.alpha" in shell("dmae-ds train digits_dmae objective.alhpa=0.5", *common, code=2)

    for alpha in (1, 0.25):
        shell(f"dmae-ds train digits_dmae run.dir=runs/alpha-{alpha} objective.alpha={alpha}", *common)
    own = [*common, "objective.name=my:Halved"]
    shell("dmae-ds plan digits_dmae --gpus 2 --gpu-memory-gib 24", *own)
    shell("dmae-ds train digits_dmae run.dir=runs/own", *own)
    first, half = (json_lines(folder / "runs" / name / "metrics.jsonl") for name in ("alpha-1", "own"))
    assert half[0]["loss"] == pytest.approx(first[0]["loss"] / 2, rel=1e-5)

    # The end of the log loads the student into timm, as it stands there.
    log = (folder / "runs" / "own" / "train.log").read_text()
    lines = [line.strip() for line in log.splitlines()]
    code = [line for line in lines if line.startswith(("import ", "model", "from "))]
    assert any("create_model" in line for line in code) and any("load_state_dict" in line for line in code)
    monkeypatch.chdir(folder)
    exec("\n".join(code), {})

    runs = ["runs/alpha-1", "runs/alpha-0.25", "runs/own"]
    shell("dmae-ds eval knn", *runs, "--k", 5, 20)
    results = json_lines(folder / "runs" / "own" / "results.jsonl")
    assert {line["settings"]["k"] for line in results} == {5, 20}
    shell("dmae-ds report", *runs, "--out", "page.html")
    page = (folder / "page.html").read_text()
    assert "objective.alpha" in page and "my:Halved" in page
    shell("dmae-ds export runs/own --to timm")
    assert (folder / "runs" / "own" / "export" / "timm" / "README.md").exists()
