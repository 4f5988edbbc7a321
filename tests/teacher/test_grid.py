"""A /14 teacher and a /16 student see the same places of the same image."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.objectives import MaeConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.patches import Normalize
from dmae_ds.models.positions import sincos_positions
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.mae import Mae
from dmae_ds.teacher.build import build_frozen_teacher
from dmae_ds.teacher.grid import PatchView, check_grids, explain_grids
from dmae_ds.weights.positions import fit_positions
from tests.messages import refused

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A /14 teacher of 224 px with sin-cos positions, like MAE's ViT-H, and one with learned positions."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    state = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=224, patch_size=14, **SMALL
    ).state_dict()
    state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in state.items()}
    save_file({**state, "pos_embed": sincos_positions(32, (16, 16))}, folder / "sincos.safetensors")
    save_file(state, folder / "learned.safetensors")
    return folder


def teacher_at(path, img_size, taps=("block/2",)):
    config = TeacherConfig(
        name="vit_tiny_patch16_224", patch_size=14, img_size=img_size, weights=str(path), **SMALL
    )
    return build_frozen_teacher(config, taps=taps, whole_blocks=2, mean=MEAN, std=STD, device=CPU)


def student_at(img_size):
    student = build_student(
        "vit_tiny_patch16_224",
        {"img_size": img_size, "patch_size": 16, **SMALL},
        generator=torch.Generator().manual_seed(1),
    )
    config = MaeConfig(name="mae", decoder={"depth": 1, "embed_dim": 16, "num_heads": 2})
    return Mae(config, student=student, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("student_size, teacher_size, grid", [(224, 196, 14), (256, 224, 16)])
def test_a_change_of_one_patch_changes_exactly_its_token_on_both_sides(
    weights, student_size, teacher_size, grid
):
    objective, teacher = student_at(student_size), teacher_at(weights / "sincos.safetensors", teacher_size)
    images = torch.randint(
        0,
        256,
        (2, 3, student_size, student_size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(3),
    )
    noise = torch.rand(2, grid * grid, generator=torch.Generator().manual_seed(4))
    normalize = Normalize(MEAN, STD)

    def tokens(images):
        batch = objective.prepare(Batch(images, noise), normalize)
        sides = (
            objective.student.embed(batch.visible, batch.ids_keep),
            teacher.vit.embed(teacher.view(batch.visible), batch.ids_keep),
        )
        return [side.detach() for side in sides], batch.ids_keep

    before, ids_keep = tokens(images)
    assert [side.shape[1] for side in before] == [1 + ids_keep.shape[1]] * 2
    for which in (0, 7, ids_keep.shape[1] - 1):
        place = int(ids_keep[1, which])
        row, column = divmod(place, grid)
        reconstructed = images.clone()
        reconstructed[1, :, row * 16 : (row + 1) * 16, column * 16 : (column + 1) * 16] ^= 255
        after, _ = tokens(reconstructed)
        for side_before, side_after in zip(before, after, strict=True):
            changed = (side_before != side_after).any(dim=-1).nonzero().tolist()
            assert changed == [[1, 1 + which]]


def test_a_masked_neighbour_never_reaches_the_teacher(weights):
    """Resizing the whole image would carry its pixels over the border."""
    objective, teacher = student_at(224), teacher_at(weights / "sincos.safetensors", 196)
    images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    noise = torch.arange(196.0)[None]  # the first quarter of the patches stays visible
    batch = objective.prepare(Batch(images, noise), Normalize(MEAN, STD))
    images[:, :, 4 * 16 :] = 255  # all of it masked
    reconstructed = objective.prepare(Batch(images, noise), Normalize(MEAN, STD))
    assert not torch.equal(batch.masked, reconstructed.masked)
    assert torch.equal(teacher.features(batch)["block/2"], teacher.features(reconstructed)["block/2"])


def test_sin_cos_positions_are_computed_exactly(weights):
    teacher = teacher_at(weights / "sincos.safetensors", 196)
    assert torch.equal(teacher.vit.pos_embed, sincos_positions(32, (14, 14)))
    assert any(
        "sin-cos positions computed for this grid: 16x16 -> 14x14" in note for note in teacher.parts.notes
    )


def test_learned_positions_are_interpolated_as_timm_does(weights):
    teacher = teacher_at(weights / "learned.safetensors", 196)
    assert any("learned positions interpolated: 16x16 -> 14x14" in note for note in teacher.parts.notes)
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=196, patch_size=14, **SMALL)
    reference.load_state_dict(
        checkpoint_filter_fn(load_file(weights / "learned.safetensors"), reference), strict=True
    )
    torch.testing.assert_close(teacher.vit.pos_embed, reference.pos_embed.detach(), rtol=0, atol=1e-6)


def test_prefix_positions_stay_and_the_grid_may_grow():
    positions = torch.randn(1, 1 + 16, 8, generator=torch.Generator().manual_seed(0))
    larger, note = fit_positions(positions, num_prefix=1, grid=(6, 6))
    assert larger.shape == (1, 37, 8) and torch.equal(larger[:, 0], positions[:, 0])
    assert "interpolated: 4x4 -> 6x6" in note
    with refused("weights", 18):
        fit_positions(torch.zeros(1, 18, 8), num_prefix=1, grid=(4, 4))


def test_without_a_size_in_the_recipe_another_grid_is_misshapen(weights, tmp_path):
    config = TeacherConfig(
        name="vit_tiny_patch16_224", weights=str(weights / "learned.safetensors"), patch_size=16, **SMALL
    )
    with refused("pos_embed", [1, 257, 32], [1, 197, 32], "teacher.img_size"):
        build_frozen_teacher(config, taps=("block/1",), whole_blocks=2, mean=MEAN, std=STD, device=CPU)


def test_every_other_mismatch_names_two_solutions():
    check_grids(student_grid=(14, 14), student_patch=16, teacher_grid=(14, 14), teacher_patch=14)
    with refused("teacher.img_size=196", "student.img_size=256"):
        check_grids(student_grid=(14, 14), student_patch=16, teacher_grid=(16, 16), teacher_patch=14)


def test_the_log_explains_the_grid_that_was_chosen():
    assert explain_grids(grid=(14, 14), student_patch=16, teacher_patch=16) == ""
    text = explain_grids(grid=(14, 14), student_patch=16, teacher_patch=14)
    assert all(word in text for word in ("14x14", "224 px", "196 px"))


def test_a_view_changes_pixel_statistics_and_keeps_flat_patches_flat():
    view = PatchView(14, mean=MEAN, std=STD, teacher_mean=(0.5, 0.5, 0.5), teacher_std=(0.5, 0.5, 0.5))
    pixels = torch.tensor([10, 100, 250], dtype=torch.uint8).expand(1, 2, 16, 16, 3)
    seen = view(Normalize(MEAN, STD)(pixels))
    assert seen.shape == (1, 2, 14, 14, 3)
    expected = (torch.tensor([10.0, 100.0, 250.0]) / 255 - 0.5) / 0.5
    torch.testing.assert_close(seen, expected.expand_as(seen), rtol=0, atol=1e-5)


def test_equal_patches_and_statistics_pass_untouched():
    patches = torch.randn(1, 2, 16, 16, 3)
    assert PatchView(16, mean=MEAN, std=STD, teacher_mean=MEAN, teacher_std=STD)(patches) is patches
