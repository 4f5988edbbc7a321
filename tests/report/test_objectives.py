"""The page of a run without a pixel decoder and with an EMA teacher, whose targets may collapse."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file

from dmae_ds.config.load import dump_config
from dmae_ds.config.objectives import MaeConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.evaluate.facts import find_collapses, find_dead_terms
from dmae_ds.evaluate.record import RunRecord
from dmae_ds.objectives.build import build_objective
from dmae_ds.report import write_report
from tests.evaluate.conftest import STUDENT, TEACHER

SPREAD, COLLAPSED = 0.02, 1e-5


def config_of(folder, shards, **objective) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(folder)},
            "student": STUDENT,
            "teacher": TEACHER if "distill" in objective else None,
            "objective": {"name": "mocov3", "hidden_dim": 8, "output_dim": 4, **objective},
            "data": {"train": str(shards[0]), "val": str(shards[1]), "num_workers": 0},
            "optim": {"global_batch": 6, "epochs": 9, "warmup_epochs": 1},
        }
    )


def rows_of(*, spread: float, epochs: float = 9.0, **more) -> list[dict]:
    return [
        {
            "step": step,
            "epoch": step / 30 * epochs,
            "lr": 1e-3,
            "loss": 3 / step,
            "contrast": 3 / step,
            "target/spread": spread,
            "images_per_s": 100.0,
            "rank/mean": 6.0,
            **more,
        }
        for step in range(1, 31)
    ]


@pytest.fixture
def page(tmp_path, shards) -> str:
    run = tmp_path / "run"
    config = config_of(run, shards)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    weights = build_objective(config)[0].state_dict()
    for name, part in (("student", True), ("decoder", False)):
        tensors = {
            key.removeprefix("student."): tensor.contiguous()
            for key, tensor in weights.items()
            if key.startswith("student.") == part
        }
        save_file(tensors, run / f"{name}.safetensors", metadata={"format": "pt", "step": "30"})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(spread=COLLAPSED)))
    return write_report([run]).read_text(encoding="utf-8")


def test_the_page_shows_what_was_measured_and_names_what_is_missing(page):
    assert "mocov3" in page and ">reconstructed<" not in page and page.count('class="missing"') == 3
    assert "Attention of CLS" in page and "contrast (training)" in page and "student, last" in page
    assert "spread of the targets" in page and page.count("0.00%") == 2
    assert "target/spread (training)" not in page  # a sign of health, not a loss


@pytest.mark.parametrize(
    "spread, epochs, alarms", [(COLLAPSED, 9.0, 1), (SPREAD, 9.0, 0), (COLLAPSED, 5.0, 0)]
)
def test_a_collapsed_target_is_an_alarm_once_the_run_is_two_thirds_through(
    tmp_path, shards, spread, epochs, alarms
):
    record = RunRecord(tmp_path, config_of(tmp_path, shards), rows_of(spread=spread, epochs=epochs), [])
    assert len(find_collapses(record, "run")) == alarms


def test_an_objective_that_reads_cls_alone_is_judged_by_it(tmp_path, shards):
    def alarms(objective, **ranks):
        config = config_of(tmp_path, shards)
        if objective == "mae":
            config = config.model_copy(update={"objective": MaeConfig(name="mae")})
        rows = rows_of(spread=SPREAD, **ranks)
        rows[0] |= {"rank/mean": 6.0, "rank/cls": 6.0}
        return len(find_collapses(RunRecord(tmp_path, config, rows, []), "run"))

    low_mean, low_cls = {"rank/mean": 2.0, "rank/cls": 4.0}, {"rank/mean": 4.0, "rank/cls": 2.0}
    assert (alarms("mocov3", **low_mean), alarms("mocov3", **low_cls)) == (0, 1)
    assert (alarms("mae", **low_mean), alarms("mae", **low_cls)) == (1, 0)


def test_a_dead_term_of_another_objective_names_the_keys_that_fix_it(tmp_path, shards):
    record = RunRecord(
        tmp_path,
        config_of(tmp_path, shards, distill={"normalize": "l2"}),
        rows_of(spread=SPREAD, **{"share/1": 0.01}),
        [],
    )
    (sentence,) = find_dead_terms(record, "run")
    for word in ("block 1", "1.0%", "objective.distill.alpha", "objective.distill.normalize=none"):
        assert word in sentence
