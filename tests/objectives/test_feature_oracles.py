"""`features` against numbers computed with the published code of Proteus and of a MaskDistill (oracles)."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from torch import Tensor, nn

from dmae_ds.config.features import FeaturesConfig
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.masking import gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import train_positions
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.objectives.features import Features, FeaturesBatch
from dmae_ds.teacher.build import build_frozen_teacher

PROTEUS = [
    {"name": "token", "tap": "cls", "student": "cls", "head": "norm_linear"},
    {"name": "feature", "tap": "tokens", "student": "tokens", "cls_head": "token", "head": "norm_linear"},
    {"name": "patch", "tap": "tokens", "student": "tokens", "where": "masked", "head": "norm_linear"},
]
HEADS = {"token_head": 0, "fea_head": 1, "patch_head": 2}
# {a variant of case a of mask_distill: the settings that differ}
VARIANTS = {
    "a": {},
    "a.l1": {"distance": "l1", "beta": None},
    "a.l2": {"distance": "l2", "beta": None},
    "a.beta1": {"beta": 1.0},
    "a.raw_target": {"normalize": "none"},
    "b": {"beta": 0.5},
}


def read(path) -> tuple[dict[str, Tensor], dict, dict]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), json.loads(metadata["cases"]), json.loads(metadata["names"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.detach().double(), expected.double()
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm(), (found, expected)


@pytest.fixture(scope="module")
def proteus(oracles):
    return read(oracles / "proteus.safetensors")


@pytest.fixture(scope="module")
def mask_distill(oracles):
    return read(oracles / "mask_distill.safetensors")


def dinov2(about: dict, who: str, state: dict[str, Tensor]) -> nn.Module:
    numbers = {"img_size": about["img"], "patch_size": about["patch"], "depth": about[f"{who}_depth"]}
    numbers |= {"embed_dim": about[f"{who}_dim"], "num_heads": about[f"{who}_heads"]}
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **numbers)
    vit.load_state_dict({name: tensor for name, tensor in state.items() if name != "mask_token"})
    return vit


def proteus_batch(tensors: dict[str, Tensor]) -> FeaturesBatch:
    patches = patchify(tensors["a.images"].float(), 8)
    mask = tensors["a.mask"].bool()
    ids = torch.arange(16).expand(4, -1)
    # The published code masks the first images; which ones is no part of the loss, and ours are every second.
    rows = [0, 2, 1, 3]
    patches, mask = patches[rows], mask[rows]
    assert mask.any(dim=1).tolist() == [True, False, True, False]
    places = mask[::2].nonzero()[:, 1].view(2, -1)
    return FeaturesBatch(patches, patches[:, :0], ids, ids[:, :0], own=patches, places=places)


@pytest.mark.parametrize(
    "variant, weights", [("a", (1, 1, 1)), ("a.factors", (0.5, 2, 3)), ("a.token_only", (1, 0, 0))]
)
def test_proteus_is_three_targets(proteus, tmp_path, variant, weights):
    tensors, cases, names = proteus
    about = cases["a"]
    student = MaskedViT(dinov2(about, "student", part(tensors, "a.student.")))
    train_positions(student)
    targets = [{**target, "weight": weight} for target, weight in zip(PROTEUS, weights, strict=True)]
    mask = {"ratio": 0.5, "whole_pass": True, "every": 2}
    objective = Features(
        FeaturesConfig(name="features", targets=targets, mask=mask),
        student=student,
        teachers={"": TeacherShape(3, 48)},
        generator=torch.Generator().manual_seed(0),
    )
    for head, number in HEADS.items():
        objective.terms[number].head.load_state_dict(part(tensors, f"a.{head}."))
    objective.mask_token.token.data = tensors["a.student.mask_token"].float()[0]
    save_file(part(tensors, "a.teacher."), tmp_path / "teacher.safetensors")
    numbers = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4}
    config = TeacherConfig(
        name="vit_small_patch14_dinov2", weights=str(tmp_path / "teacher.safetensors"), **numbers
    )
    half = (0.5,) * 3
    teacher = build_frozen_teacher(
        config, taps=objective.taps, whole_blocks=3, mean=half, std=half, device=torch.device("cpu")
    )
    batch = proteus_batch(tensors)
    features = teacher.features(batch)
    close(features["cls"], tensors["a.teacher_cls"][[0, 2, 1, 3]], 1e-6)
    close(features["tokens"][:, 1:], tensors["a.teacher_patches"][[0, 2, 1, 3]], 1e-6)
    losses = objective(batch, features)
    close(losses["loss"], tensors[f"{variant}.loss"], 1e-6)
    for term, name, weight in zip(PROTEUS, ("token_loss", "fea_loss", "patch_loss"), weights, strict=True):
        close(weight * losses[term["name"]], tensors[f"{variant}.{name}"], 1e-6)
    losses["loss"].backward()
    parameters = dict(objective.named_parameters())
    mine = {"student.mask_token": "mask_token.token"}
    for head, number in HEADS.items():
        mine |= {f"{head}.{name}": f"terms.{number}.head.{name}" for name in part(tensors, f"a.{head}.")}
    norms = [parameters[mine.get(name, name)].grad.norm() for name in names["a"]]
    assert {mine.get(name, name) for name in names["a"]} == parameters.keys()
    close(torch.stack(norms), tensors[f"{variant}.grad_norm_float64"], 1e-5)
    if variant == "a":
        for name, expected in part(tensors, "a.grad.").items():
            found = parameters[mine.get(name, name)].grad
            close(found.view(expected.shape), expected, 1e-5)


class BeitStudent(nn.Module):
    """MaskDistill's student, timm's BEiT, with the interface of ours: CLS, patches, taps and mask tokens."""

    def __init__(self, about: dict, state: dict[str, Tensor]):
        super().__init__()
        self.beit = Beit(
            img_size=about["img"],
            patch_size=about["patch"],
            embed_dim=about["student_dim"],
            depth=about["student_depth"],
            num_heads=about["student_heads"],
            num_classes=0,
            use_abs_pos_emb=True,
            use_rel_pos_bias=True,
            init_values=0.1,
        )
        absent, left = self.beit.load_state_dict(
            {name: tensor for name, tensor in state.items() if name != "mask_token"}, strict=False
        )
        assert not left and all("relative_position_index" in name or "k_bias" in name for name in absent)
        self.embed_dim, self.depth = about["student_dim"], about["student_depth"]
        self.patch_size, self.num_cls = about["patch"], 1
        side = about["img"] // about["patch"]
        self.grid, self.num_patches = (side, side), side**2
        self.norm = nn.LayerNorm(about["student_dim"])  # the published student has none

    @property
    def cls_token(self) -> Tensor:
        return self.beit.cls_token

    def forward(self, patches, ids, taps, replace):
        side, size = self.grid[0], self.patch_size
        images = patches.unflatten(1, self.grid).permute(0, 5, 1, 3, 2, 4)
        tokens = replace(self.beit.patch_embed(images.reshape(len(patches), 3, side * size, side * size)))
        tokens = torch.cat([self.beit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.beit.pos_embed
        for block in self.beit.blocks:
            tokens = block(tokens)
        return tokens, {self.depth: tokens}


@pytest.mark.parametrize("variant", VARIANTS)
def test_mask_distill_is_one_target(mask_distill, variant):
    tensors, cases, names = mask_distill
    case = variant[0]
    about = cases[case]
    student = BeitStudent(about, part(tensors, f"{case}.student."))
    target = {"tap": "tokens", "student": f"block/{about['student_depth']}", "where": "masked"}
    target |= {"distance": "smooth_l1", "beta": 2.0, "normalize": "standard", **VARIANTS[variant]}
    objective = Features(
        FeaturesConfig(name="features", targets=[target], mask={"ratio": 0.4, "shape": "block"}),
        student=student,
        teachers={"": TeacherShape(about["teacher_depth"], about["teacher_dim"], has_cls=False)},
        generator=torch.Generator().manual_seed(0),
    )
    objective.terms[0].head[0].load_state_dict(part(tensors, f"{case}.head.fc."))
    objective.mask_token.token.data = tensors[f"{case}.student.mask_token"].float()[0, 0]
    patches = patchify(tensors[f"{case}.images"].float(), about["patch"])
    mask = tensors[f"{case}.mask"].bool().flatten(1)
    assert objective.num_masked == int(mask.sum(1)[0])
    ids = torch.arange(mask.shape[1]).expand(len(mask), -1)
    places = mask.nonzero()[:, 1].view(len(mask), -1)
    batch = FeaturesBatch(patches, patches[:, :0], ids, ids[:, :0], own=patches, places=places)
    seen = {}
    hook = objective.terms[0].register_forward_hook(lambda module, inputs, output: seen.update(out=output))
    losses = objective(batch, {"tokens": tensors[f"{case}.teacher_feature"]})
    hook.remove()
    close(losses["loss"], tensors[f"{variant}.loss"], 1e-6)
    close(seen["out"], gather_patches(tensors[f"{case}.prediction"], places), 1e-6)
    losses["loss"].backward()
    parameters = dict(objective.named_parameters())
    mine = {"student.mask_token": "mask_token.token", "head.fc.weight": "terms.0.head.0.weight"}
    mine |= {"head.fc.bias": "terms.0.head.0.bias"}
    gradients = [
        parameters[mine.get(name, name.replace("student.", "student.beit."))].grad for name in names[case]
    ]
    norms = [torch.tensor(float("nan")) if grad is None else grad.norm() for grad in gradients]
    expected = tensors[f"{variant}.grad_norm_float64"]
    assert [bool(norm.isnan()) for norm in norms] == expected.isnan().tolist()
    close(torch.stack(norms).nan_to_num(), expected.nan_to_num(), 1e-5)
    if variant == case:
        for name, gradient in part(tensors, f"{case}.grad.").items():
            found = parameters[mine.get(name, name.replace("student.", "student.beit."))].grad
            close(found.view(gradient.shape), gradient, 1e-5)
