"""Evaluations on a GPU; they run before test_training.py, whose process group accelerate would find."""

from __future__ import annotations

import pytest

from dmae_ds.cli.main import main
from dmae_ds.evaluate.results import read_results
from tests.gpu.conftest import REHEARSAL

pytestmark = pytest.mark.gpu
FEW = ["optim.epochs=0.1", "optim.warmup_epochs=0", "data.num_workers=0"] if REHEARSAL else ["optim.epochs=1"]


def test_knn_and_fine_tuning(reference, record_property):
    run = reference("dmae")
    assert main(["eval", "knn", str(run)]) == 0
    assert main(["eval", "finetune", str(run), "--recipe", "finetune_digits", *FEW]) == 0
    results = {result["metric"]: result["scores"] for result in read_results(run)}
    for metric in ("knn", "finetune"):
        record_property(f"{metric} top1", f"{results[metric]['top1']:.1f}")
    assert 0 < results["knn"]["top1"] <= 100 and 0 < results["finetune"]["top1"] <= 100
