"""The summary's rows of the teacher: what is saved of its compute, with and without a mask."""

from __future__ import annotations

import pytest
import timm
import torch

from dmae_ds.objectives.build import build_objective
from dmae_ds.teacher.build import load_frozen_teacher
from dmae_ds.teacher.frozen import with_notes
from dmae_ds.train.summary import describe_student, describe_teacher
from tests.objectives import small

WIDTH, BLOCK, NUM_PATCHES = 12, 12 * 12 * 12 + 13 * 12, 16  # parameters of a block: 12 D^2 + 13 D
DECODER = {"decoder_embed.weight": (8, 12), "decoder_blocks.0.attn.qkv.weight": (240, 80)}
IN_DECODER = 8 * 12 + 240 * 80


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A whole MAE of the small teacher's size, whose decoder is about as large as its encoder."""
    torch.manual_seed(0)
    numbers = {
        key: small.TEACHER[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    }
    state = timm.create_model(small.TEACHER["name"], num_classes=0, **numbers).state_dict()
    state |= {name: torch.zeros(shape) for name, shape in DECODER.items()}
    path = tmp_path_factory.mktemp("teacher") / "mae.pth"
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize(
    ("section", "sees", "tokens"),
    [
        ({"name": "dmae", "decoder": small.DECODER}, "visible", 1 + 4),
        ({"name": "dmae", "decoder": small.DECODER}, "all", 1 + NUM_PATCHES),
        ({"name": "dmae", "decoder": small.DECODER, "mask_ratio": 0.5}, "visible", 1 + 8),
        ({"name": "mocov3", "hidden_dim": 8, "output_dim": 4, "distill": {}}, "visible", 1 + NUM_PATCHES),
    ],
)
def test_the_saved_share_of_the_teachers_compute_by_hand(file, section, sees, tokens):
    config = small.config_for(section, teacher=True)
    teacher = config.teacher.model_copy(update={"weights": str(file), "format": "mae", "sees": sees})
    config = config.model_copy(update={"teacher": teacher})
    objective, _ = build_objective(config)
    built = load_frozen_teacher(
        teacher,
        taps=objective.taps,
        whole_blocks=8,
        mean=config.data.mean,
        std=config.data.std,
        device=torch.device("cpu"),
    )
    rows = describe_teacher(config, objective, built)
    assert "WARNING" not in rows
    above = tokens * 2 * BLOCK + (1 + NUM_PATCHES) * IN_DECODER  # blocks 7 and 8 of 8; the decoder sees all
    share = above / (above + tokens * 6 * BLOCK)
    assert rows["left out"].startswith("blocks 7-8, decoder")
    assert f"; {share:.0%} of" in rows["left out"]
    assert f"sees {sees} patches" in rows["teacher"]
    for compiled in (False, True):
        float8 = {"teacher": teacher.model_copy(update={"dtype": "fp8"}), "compile": compiled}
        rows = describe_teacher(config.model_copy(update=float8), objective, built)
        assert ("compile=true" in rows.get("WARNING", "")) == (not compiled)
    built.parts = with_notes(built.parts, "grid fits", "WARNING: looks untrained")
    rows = describe_teacher(config, objective, built)
    assert "grid fits" in rows["checked"] and "untrained" not in rows["checked"]
    assert "looks untrained" in rows["WARNING"] and "grid fits" not in rows["WARNING"]
    whole = {"teacher": teacher.model_copy(update={"format": "dinov2"})}
    rows = describe_teacher(config.model_copy(update=whole), objective, built)
    assert ("teacher.sees=all" in rows.get("WARNING", "")) == (tokens < 1 + NUM_PATCHES)


@pytest.mark.parametrize(
    "weights, notes, words",
    [
        (None, "", []),
        ("old.pth", "", ["begins with old.pth"]),
        ("old.pth", "4x4 -> 8x8", ["begins with old.pth", "(4x4 -> 8x8)"]),
    ],
)
def test_the_student_s_size_and_what_it_begins_with(weights, notes, words):
    config = small.config_for({"name": "mae", "decoder": small.DECODER}, teacher=False)
    config = config.model_copy(update={"student": config.student.model_copy(update={"weights": weights})})
    objective, _ = build_objective(config)
    objective.initial_notes = notes
    row = describe_student(config, objective)
    assert row.startswith(config.student.name) and ("begins" in row) == bool(words) and "()" not in row
    assert all(word in row for word in words)
