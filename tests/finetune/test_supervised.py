"""Supervised baselines under a fine-tuned classifier in this process: what they write, and resume."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from dmae_ds.finetune import record
from tests.finetune.conftest import PLAIN, finetune
from tests.finetune.test_run import assert_same_outcome

BASELINES = {
    f"supervised_{name}": name for name in ("deit_soft", "deit_hard", "logits", "features", "crd", "srrl")
}
WITH_STATE = {"supervised_features", "supervised_crd", "supervised_srrl"}  # of the task, next to the student
CRD = ["distill.crd.num_negatives=30", "distill.crd.dim=8", "optim.base_lr=1e-3"]


@pytest.mark.parametrize("recipe", sorted(BASELINES))
def test_supervised_baselines_run_on_a_fine_tuned_teacher(run, tmp_path, recipe, monkeypatch):
    finetune(run, f"run.dir={tmp_path / 'teacher'}")
    overrides = [f"distill.teacher={tmp_path / 'teacher' / 'best.safetensors'}"]
    if recipe == "supervised_crd":
        overrides += CRD
    result = finetune(run, *overrides, recipe=recipe)
    assert (
        result["metric"] == "supervised"
        and result["settings"]["distill"] == BASELINES[recipe]
        and result["settings"]["init"] == "random"
    )
    assert result["step"] == 0
    if recipe in WITH_STATE:
        file = run / recipe / "resume.pt"
        plain, count = record.save_resume, 0

        def dies(path, **state):
            nonlocal count
            plain(path, **state)
            count += 1
            if count == 1:
                raise KeyboardInterrupt

        whole = torch.load(file, weights_only=True)
        monkeypatch.setattr(record, "save_resume", dies)
        AcceleratorState._reset_state(reset_partial_state=True)
        out = f"run.dir={tmp_path / 'killed'}"
        with pytest.raises(KeyboardInterrupt):
            finetune(run, *overrides, out, recipe=recipe)
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune(run, *overrides, out, recipe=recipe, resume="auto")
        assert_same_outcome(run / recipe, tmp_path / "killed")
        resumed = torch.load(tmp_path / "killed" / "resume.pt", weights_only=True)
        extra = {name: tensor for name, tensor in whole["task"].items() if not name.startswith("student.")}
        assert extra and all(torch.equal(resumed["task"][name], tensor) for name, tensor in extra.items())
        if recipe == "supervised_crd":
            assert extra["memory_teacher"].shape == (20, 8) and (extra["normalizers"] != 1).all()


def test_crd_s_memory_is_that_of_the_whole_step_with_accumulation(run, tmp_path):
    finetune(run, f"run.dir={tmp_path / 'teacher'}")
    states = []
    for micro in (8, 4):
        out = tmp_path / str(micro)
        more = [f"distill.teacher={tmp_path / 'teacher' / 'best.safetensors'}", *CRD, *PLAIN]
        more += [f"optim.micro_batch={micro}", f"run.dir={out}"]
        finetune(run, *more, recipe="supervised_crd")
        states.append(torch.load(out / "resume.pt", weights_only=True)["task"])
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
