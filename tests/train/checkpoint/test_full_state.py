"""DeepSpeed's files of a checkpoint are read as plain data, and their pieces are joined in full."""

from __future__ import annotations

from pathlib import Path

import torch

from dmae_ds.errors import RunFailed
from dmae_ds.train.checkpoint.deepspeed_files import load_file
from dmae_ds.train.checkpoint.full_state import MOMENTS, STATES, FullState
from dmae_ds.train.checkpoint.reshard import cut_piece
from tests.messages import refused


def test_a_file_with_other_objects_is_not_read(tmp_path):
    torch.save({"step": 1, "harmless": Path("looks")}, tmp_path / "file.pt")
    with refused(tmp_path / "file.pt", error=RunFailed):
        load_file(tmp_path / "file.pt")


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
