"""TinyMIM compared with numbers of its published code and with its formula in loops in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.views import View
from dmae_ds.models.patches import Normalize, patchify
from dmae_ds.objectives.base import all_places
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.tinymim import CopiedBatch, log_relation
from dmae_ds.teacher.build import load_frozen_teacher
from tests.messages import refused
from tests.objectives import reference, small

MEAN = STD = (0.5, 0.5, 0.5)
NAME = "vit_tiny_patch16_224"


def below(tensors: dict, prefix: str) -> dict:
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("case", ["a", "b"])
def test_losses_relations_and_gradients_are_the_published_ones(oracles, tmp_path, case):
    tensors = load_file(oracles / "tinymim.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}
    with safe_open(oracles / "tinymim.safetensors", "pt") as file:
        options, names = (json.loads(file.metadata()[key])[case] for key in ("cases", "names"))
    torch.save({"model": below(tensors, f"{case}.teacher.")}, tmp_path / "mae.pth")
    shape = {"name": NAME, "img_size": options["img"], "patch_size": options["patch"]}
    numbers = {
        side: {**shape, "embed_dim": options[f"{side}_dim"], "depth": options[f"{side}_depth"]}
        for side in ("student", "teacher")
    }
    numbers["student"]["num_heads"] = options["student_heads"]
    numbers["teacher"] |= {"num_heads": options["heads"], "weights": str(tmp_path / "mae.pth")}
    config = RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "data": {"train": "unused", "mean": MEAN, "std": STD},
            "student": numbers["student"],
            "teacher": {**numbers["teacher"], "format": "mae"},
            "objective": {"name": "tinymim", "teacher_block": options["teacher_layer"]},
        }
    )
    objective, shapes = build_objective(config)
    shape = shapes[""]
    objective.student.load_state_dict(below(tensors, f"{case}.student."))
    teacher = load_frozen_teacher(
        config.teacher,
        taps=objective.taps,
        whole_blocks=shape.depth,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
    )
    seen, copy = (
        patchify(tensors[f"{case}.images_{side}"].float(), options["patch"])
        for side in ("teacher", "student")
    )
    ids = all_places(len(seen), objective.student.grid, torch.device("cpu"))
    batch = CopiedBatch(seen, seen[:, :0], ids, ids[:, :0], copy)
    features = teacher.features(batch)
    q, k, v = features[objective.taps[0]].unbind(1)
    for found, name in ((log_relation(q, k), "qk"), (log_relation(v, v), "vv")):
        torch.testing.assert_close(found.exp(), tensors[f"{case}.teacher_{name}"], rtol=1e-5, atol=1e-7)
    out = objective(batch, features)
    for found, name in ((out["loss"], "loss"), (out["align/qk"], "qk_loss"), (out["align/vv"], "vv_loss")):
        assert found.item() == pytest.approx(tensors[f"{case}.{name}"].item(), rel=1e-6)
    out["loss"].backward()
    ours = dict(objective.student.named_parameters())
    norms = dict(zip(names, tensors[f"{case}.grad_norm_float64"].tolist(), strict=True))
    assert set(ours) == {name for name, norm in norms.items() if not math.isnan(norm) and name != "pos_embed"}
    for name, parameter in ours.items():
        assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-5, abs=1e-9), name
    last = f"blocks.{options['student_depth'] - 1}.attn.qkv.bias"
    for name, theirs in ((last, "last_qkv.bias"), ("patch_embed.proj.weight",) * 2):
        expected = tensors[f"{case}.grad.{theirs}"]
        assert (ours[name].grad - expected).norm() < 1e-5 * expected.norm(), name


def formula(student: torch.Tensor, teacher: torch.Tensor) -> tuple[float, float]:
    """KL of both relations, entry by entry. [N, 3, heads, T, d] each."""
    losses = []
    for one, other in ((0, 1), (2, 2)):
        total, rows = 0.0, 0
        for image in range(len(student)):
            for head in range(student.shape[2]):
                for query in range(student.shape[3]):
                    both = []
                    for network in (student, teacher):
                        first = network[image, one, head, query].tolist()
                        scores = [
                            sum(a * b for a, b in zip(first, key, strict=True)) / math.sqrt(len(first))
                            for key in network[image, other, head].tolist()
                        ]
                        whole = sum(math.exp(score) for score in scores)
                        both.append([math.exp(score) / whole for score in scores])
                    total += sum(t * math.log(t / s) for s, t in zip(*both, strict=True))
                    rows += 1
        losses.append(total / rows)
    return losses[0], losses[1]


def tinymim(**changes):
    return {"name": "tinymim", **changes}


@pytest.mark.parametrize("has_cls", [True, False], ids=["teacher with CLS", "teacher without CLS"])
def test_the_loss_is_the_formula_of_the_student_s_copy(has_cls):
    objective = small.build(tinymim(), teacher=True)
    assert objective.views == (View(), View(copy_of=0, photometric="jitter")) and not objective.student.rope
    assert objective.taps == ("relation/6",) and objective.pairs == ((4, 6),)
    batch = small.make_batch(2, sizes=(small.SIZE, small.SIZE))
    masked = small.prepare(objective, batch)
    assert not torch.equal(masked.visible, masked.copy) and masked.masked.shape[1] == 0
    target = torch.randn(2, 3, 2, has_cls + 16, 6, dtype=torch.float64)
    out = objective(masked, {"relation/6": target})
    state = {name: tensor.detach() for name, tensor in objective.student.state_dict().items()}
    places, student = list(range(16)), []
    for image in batch.views[1]:
        _, after = reference.encode(
            state, image, places, size=small.PATCH, heads=small.HEADS, depth=small.DEPTH - 1, grid=small.GRID
        )
        prefix = f"blocks.{small.DEPTH - 1}"
        normed = reference.layer_norm(after[-1], state, f"{prefix}.norm1")
        qkv = reference.linear(normed, state, f"{prefix}.attn.qkv")[1 - has_cls :]
        # [T, 3 * D] -> [3, heads of the teacher, T, d]
        student.append(torch.stack([torch.stack(part.chunk(2, dim=1)) for part in qkv.chunk(3, dim=1)]))
    qk, vv = formula(torch.stack(student), target)
    assert out["align/qk"].item() == pytest.approx(qk, rel=1e-6)
    assert out["align/vv"].item() == pytest.approx(vv, rel=1e-6)
    assert out["loss"].item() == pytest.approx(qk + vv, rel=1e-6)


def test_without_a_change_of_colours_both_see_the_same():
    objective = small.build(tinymim(photometric=False), teacher=True)
    assert objective.views == (View(),)
    masked = objective.prepare(small.make_batch(2), Normalize(MEAN, STD))
    assert torch.equal(masked.visible, masked.copy)


def test_a_peaked_relation_of_the_student_has_a_finite_loss_and_gradient():
    objective = small.build(tinymim(), teacher=True).float()
    with torch.no_grad():
        objective.student.blocks[-1].attn.qkv.weight.mul_(1e4)
    masked = objective.prepare(
        Batch(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), None), Normalize(MEAN, STD)
    )
    loss = objective(masked, {"relation/6": 1e3 * torch.randn(2, 3, 2, 17, 6)})["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in objective.parameters())


def test_only_what_the_loss_reads_is_trained_and_the_rest_stays_in_the_student_s_file():
    objective = small.build(tinymim(), teacher=True)
    trained = {name for name, _ in objective.student.named_parameters()}
    held = set(objective.student.state_dict()) - trained - {"pos_embed"}
    prefix = f"blocks.{small.DEPTH - 1}"
    assert held == {
        f"{name}.{kind}"
        for name in (
            *(f"{prefix}.{part}" for part in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")),
            "norm",
        )
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("objective", "student", "words"),
    [
        ({"teacher_block": 9}, {}, ("objective.teacher_block", 9, 8)),
        ({}, {"embed_dim": 20, "num_heads": 2}, ("student.embed_dim 20", "teacher's 3 heads")),
        (
            {},
            {"name": "vit_small_patch16_dinov3", "embed_dim": 36, "num_heads": 2},
            ("student.name", "rotary"),
        ),
    ],
)
def test_what_can_t_be_compared_is_refused(objective, student, words):
    config = small.config_for({"name": "tinymim", **objective}, teacher=True)
    wide = config.teacher.model_copy(update={"num_heads": 3})
    config = config.model_copy(update={"teacher": wide, "student": config.student.model_copy(update=student)})
    with refused(*words):
        build_objective(config)
