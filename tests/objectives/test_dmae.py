"""DMAE's settings that the published numbers don't cover, each against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from dmae_ds.config.objectives import DmaeConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.align import build_head, distance
from dmae_ds.objectives.dmae import Dmae
from dmae_ds.objectives.feature_distillation import TeacherShape, resolve_pairs
from tests.messages import refused

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 4, "num_heads": 2}
TEACHER = TeacherShape(depth=8, embed_dim=12)


def build(**options) -> Dmae:
    config = DmaeConfig(name="dmae", decoder={"depth": 1, "embed_dim": 8, "num_heads": 2}, **options)
    generator = torch.Generator().manual_seed(0)
    return Dmae(
        config,
        student=build_student("vit_tiny_patch16_224", TINY, generator=generator),
        teacher=TEACHER,
        generator=generator,
    )


def parts_of(objective: Dmae) -> dict:
    generator = torch.Generator().manual_seed(1)
    batch = objective.prepare(
        Batch(torch.randn(3, 3, 16, 16, generator=generator), torch.rand(3, 16, generator=generator)),
        torch.nn.Identity(),
    )
    features = {
        f"block/{b}": torch.randn(
            3, 1 + objective.num_visible, 12, generator=torch.Generator().manual_seed(b)
        )
        for b in range(1, 9)
    }
    return objective(batch, features)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0])
def test_alpha_weighs_the_distillation_alone(alpha):
    parts = parts_of(build(alpha=alpha))
    assert parts["loss"].item() == pytest.approx(
        (parts["pixel"] + alpha * parts["align/3-6"]).item(), rel=1e-6
    )


def test_pairs_may_be_several_and_in_any_order_and_one_block_may_have_two_teachers():
    objective = build(pairs=[(4, 2), (1, 8), (4, 6)])
    assert objective.taps == ("block/2", "block/6", "block/8")
    parts = parts_of(objective)
    names = ["align/4-2", "align/1-8", "align/4-6"]
    assert [name for name in parts if name.startswith("align")] == names
    assert parts["loss"].item() == pytest.approx(
        sum(parts[name] for name in ["pixel", *names]).item(), rel=1e-6
    )
    parts["loss"].backward()
    assert list(objective.gradient_shares()) == ["share/1", "share/4"]
    assert all(0 < share < 1 for share in objective.gradient_shares().values())


@pytest.mark.parametrize(
    "student, teacher, expected",
    [(12, 24, (9, 18)), (12, 32, (9, 24)), (4, 8, (3, 6)), (10, 5, (7, 3)), (1, 1, (1, 1))],
)
def test_by_default_three_quarters_of_both_depths_are_aligned(student, teacher, expected):
    assert resolve_pairs(None, student_depth=student, teacher_depth=teacher) == [expected]


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([(5, 6)], ["student", 5, 4]),
        ([(3, 9)], ["teacher", 9, 8]),
        ([(3, 6), (3, 6)], ["[[3, 6], [3, 6]]"]),
    ],
)
def test_pairs_that_do_not_exist_are_refused(pairs, words):
    with refused("objective.pairs", *words):
        resolve_pairs(pairs, student_depth=4, teacher_depth=8)


@pytest.mark.parametrize(
    "kind, shapes",
    [("linear", [(8, 12)]), ("mlp2", [(8, 12), (12, 12)]), ("mlp3", [(8, 12), (12, 12), (12, 12)])],
)
def test_heads_are_as_wide_as_the_teacher_with_gelu_between(kind, shapes):
    head = build_head(kind, 8, 12)
    linears = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == shapes
    assert [type(layer) for layer in head[1::2]] == [torch.nn.GELU] * (len(shapes) - 1)
    assert len(head) == 2 * len(shapes) - 1


FORMULAS = {
    "l1": lambda a, b: sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a),
    "l2": lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a),
    "smooth_l1": lambda a, b: (
        sum((d * d / 2 if d < 1 else d - 0.5) for d in (abs(x - y) for x, y in zip(a, b, strict=True)))
        / len(a)
    ),
    "cosine": lambda a, b: (
        1 - sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
    ),
}


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("kind", FORMULAS)
def test_distances_are_their_formulas_token_by_token(kind, normalize):
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 3, 5, generator=generator) for _ in range(2))

    def vector(tokens):
        values = tokens.double().tolist()
        return [value / math.hypot(*values) for value in values] if normalize == "l2" else values

    tokens = zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
    expected = sum(FORMULAS[kind](vector(a), vector(b)) for a, b in tokens) / 6
    assert distance(kind, student, teacher, normalize=normalize).item() == pytest.approx(expected, rel=1e-5)
    assert distance(kind, student, teacher.to(torch.bfloat16), normalize=normalize).dtype == torch.float32


@pytest.mark.parametrize("ratio, kept", [(0.75, 4), (0.9, 2)])
def test_the_decoder_predicts_the_masked_patches_and_no_others(ratio, kept):
    objective = build(mask_ratio=ratio)
    parts_of(objective)["loss"].backward()
    assert objective.num_visible == kept
    batch = objective.prepare(Batch(torch.randn(2, 3, 16, 16), torch.rand(2, 16)), torch.nn.Identity())
    latent, _ = objective.student(batch.visible, batch.ids_keep)
    assert objective.decoder(latent, batch.ids_keep, batch.ids_masked).shape == (2, 16 - kept, 4, 4, 3)
