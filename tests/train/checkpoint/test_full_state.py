"""DeepSpeed's files of a checkpoint are read as plain data, and their pieces are joined in full."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dmae_ds.errors import RunFailed
from dmae_ds.train.checkpoint.deepspeed_files import load_file
from dmae_ds.train.checkpoint.full_state import MOMENTS, STATES, FullState
from dmae_ds.train.checkpoint.reshard import check_devices, cut_piece, load_full_state
from dmae_ds.train.engine import Engine
from tests.messages import refused


def test_a_file_with_other_objects_is_not_read(tmp_path):
    torch.save({"step": 1, "harmless": Path("looks")}, tmp_path / "file.pt")
    with refused(tmp_path / "file.pt", error=RunFailed):
        load_file(tmp_path / "file.pt")


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_stay_on_the_disk_where_that_is_asked_for_and_the_file_is_no_old_one(
    tmp_path, monkeypatch, is_zip
):
    torch.save({"a": torch.ones(3)}, tmp_path / "file.pt", _use_new_zipfile_serialization=is_zip)
    asked, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: asked.append(how["mmap"]) or load(*args, **how))
    for mmap in (True, False):
        assert torch.equal(load_file(tmp_path / "file.pt", mmap=mmap)["a"], torch.ones(3))
    assert asked == [is_zip, False]


def test_deepspeed_s_counters_go_on_after_resharding(tmp_path, monkeypatch):
    for name in ("full_state.FullState", "reshard.load_full_state"):
        monkeypatch.setattr(f"dmae_ds.train.checkpoint.{name}", Mock())
    engine = Mock(spec_set=["_engine", "_offloads_to_disk", "_load_buffers", "objective"])
    engine._offloads_to_disk = False
    engine.objective.named_parameters.return_value = []
    Engine.load_resharded(engine, tmp_path, stage=2, step=5, global_batch=64)
    assert (engine._engine.global_steps, engine._engine.global_samples) == (5, 320)


def test_parameters_that_the_ranks_do_not_divide_are_cut_and_joined(tmp_path):
    shapes = [{"a": torch.Size([7]), "b": torch.Size([2, 5])}, {"c": torch.Size([1])}]
    whole = {
        (name, state): torch.randn(shape)
        for group in shapes
        for name, shape in group.items()
        for state in STATES
    }
    for rank in range(3):
        flats = [
            {state: torch.cat([cut_piece(whole[name, state], rank, 3) for name in group]) for state in STATES}
            for group in shapes
        ]
        states = {
            number: {"step": torch.tensor(4.0), **{moment: flat[moment] for moment in MOMENTS}}
            for number, flat in enumerate(flats)
        }
        optimizer = {
            "fp32_flat_groups": [flat["fp32"] for flat in flats],
            "optimizer_state_dict": {"state": states},
        }
        torch.save(
            {"optimizer_state_dict": optimizer}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        torch.save({"param_shapes": shapes}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    joined = FullState(tmp_path, stage=3)
    assert joined.names == ["a", "b", "c"] and joined.step == 4
    for name in joined.names:
        assert all(torch.equal(value, whole[name, state]) for state, value in joined.read(name).items())


class StageZero:
    """An engine of stage 0 with one parameter on torch's meta device, which stands in for a GPU."""

    def __init__(self):
        self.parameter = nn.Parameter(torch.empty(3, device="meta"))
        self.optimizer = torch.optim.AdamW([self.parameter])

    def zero_optimization_stage(self) -> int:
        return 0


class StageOne(StageZero):
    """Its optimizer wraps torch's, whose only group is one flat tensor."""

    def __init__(self):
        super().__init__()
        self.optimizer = SimpleNamespace(
            optimizer=self.optimizer, _lazy_init_hp_params_optimizer_state=lambda: None
        )

    def zero_optimization_stage(self) -> int:
        return 1


@pytest.mark.parametrize("engine", [StageZero(), StageOne()], ids=["stage 0", "stage 1"])
def test_resharded_optimizer_state_is_on_its_parameters_device(engine, monkeypatch):
    for name in ("safe_set_full_fp32_param", "safe_set_full_optimizer_state"):
        monkeypatch.setattr(f"dmae_ds.train.checkpoint.reshard.{name}", lambda *_: None)
    values = {state: torch.ones(3) for state in STATES}
    saved = SimpleNamespace(names=["a"], step=4.0, read=lambda name: values)
    load_full_state(engine, {"a": engine.parameter}, saved)
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    (states,) = optimizer.state.values()
    assert {name: value.device.type for name, value in states.items()} == dict.fromkeys(
        ("step", *MOMENTS), "meta"
    )
    assert states["step"].dtype == torch.float32
    states["step"] = torch.tensor(4.0)
    with pytest.raises(AssertionError, match="step is on cpu"):
        check_devices(optimizer)
