"""timm's families as teachers, compared with timm's own modules: registers, rotary positions, no CLS."""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor

from dmae_ds.config.objectives import DecoderConfig, DmaeConfig
from dmae_ds.models.masking import PatchBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import build_student, build_timm_vit
from dmae_ds.objectives.align import distance
from dmae_ds.objectives.dmae import Dmae, TeacherShape
from dmae_ds.teacher.frozen import FrozenTeacher
from tests.messages import refused
from tests.teacher.reference import IDS, SHAPE, TAP, Reference, timm_reference
from tests.teacher.references import IMAGES, assert_close, features, load

# {a timm name: the tokens in front of its patches}; one network of each kind that this project distinguishes.
FAMILIES = {
    "vit_small_patch14_dinov2": "cls",
    "vit_small_patch14_reg4_dinov2": "cls + 4",
    "vit_small_patch16_dinov3": "cls + 4",
    "vit_small_patch16_dinov3_qkvb": "cls + 4",
    "vit_small_plus_patch16_dinov3": "cls + 4",
    "eva02_tiny_patch14_224": "cls",
    "eva_giant_patch14_224": "cls",
    "vit_base_patch16_clip_224": "cls",
    "vit_base_patch16_siglip_224": "",
    "vit_pe_core_tiny_patch16_384": "cls",
    "deit3_small_patch16_224": "cls",
    "vit_so150m_patch16_reg4_gap_256": "4",
    "vit_small_patch16_rope_ape_224": "cls",
}
ROTARY = [name for name in FAMILIES if any(word in name for word in ("dinov3", "eva02", "pe_core", "rope"))]


@cache
def build_family(name: str) -> Reference:
    return timm_reference(name, "timm")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> SimpleNamespace:
    """A family: its name, timm's tiny network as `reference`, and the `path` of its weights."""
    reference = build_family(request.param)
    return SimpleNamespace(
        name=request.param,
        reference=reference,
        path=reference.save(tmp_path_factory.mktemp("family"), reference.tensors),
    )


def batch(ids: Tensor = IDS) -> PatchBatch:
    patches = patchify(IMAGES, 8)
    others = torch.stack([torch.tensor([i for i in range(16) if i not in keep.tolist()]) for keep in ids])
    return PatchBatch(
        visible=gather_patches(patches, ids),
        masked=gather_patches(patches, others),
        ids_keep=ids,
        ids_masked=others,
    )


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "masked"])
def test_features_are_timms_own(family, ids):
    assert_close(features(load(family.reference, family.path), ids), family.reference.features(IMAGES, ids))


def test_features_are_cls_and_visible_patches_whatever_is_in_front(family):
    teacher = load(family.reference, family.path)
    in_front = FAMILIES[family.name]
    assert features(teacher, IDS).shape == (2, 4 + ("cls" in in_front), 32)
    assert teacher.vit.num_prefix == ("cls" in in_front) + 4 * ("4" in in_front)


def test_a_teacher_that_sees_all_gives_the_visible_patches_of_a_whole_image(family):
    teacher = load(family.reference, family.path)
    seeing = FrozenTeacher(teacher.vit, teacher.taps, teacher.parts, sees="all")
    whole = family.reference.features(IMAGES, None)
    has_cls = whole.shape[1] == 17
    expected = torch.stack(
        [torch.cat([one[:has_cls], one[has_cls:][keep]]) for one, keep in zip(whole, IDS, strict=True)]
    )
    assert_close(seeing.features(batch())["block/2"], expected)


def test_a_cut_teacher_gives_the_features_of_a_whole_one_bit_for_bit(family):
    cut = load(family.reference, family.path)
    whole = load(family.reference, family.path, taps=("block/2", "block/3"))
    assert (cut.vit.depth, whole.vit.depth) == (2, 3)
    assert torch.equal(features(cut, IDS), features(whole, IDS))


def test_a_patch_keeps_its_own_position(family):
    """The same pixels at other positions give other features."""
    teacher, here = load(family.reference, family.path), batch()
    moved = teacher.features(
        PatchBatch(visible=here.visible, masked=None, ids_keep=(IDS * 7 + 3) % 16, ids_masked=None)
    )["block/2"]
    there = teacher.features(here)["block/2"]
    assert (moved - there)[:, -4:].abs().amax(dim=(0, 2)).min() > 1e-2 * there.abs().max()


def test_bf16_features_are_close_to_those_of_fp32(family):
    half = features(load(family.reference, family.path, dtype="bf16"), IDS)
    expected = family.reference.features(IMAGES, IDS)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).square().mean() < 0.03**2 * expected.square().mean()


@pytest.mark.parametrize("name", ROTARY)
def test_masked_features_of_a_rotary_teacher_are_those_of_timms_patch_dropping(tmp_path, name):
    reference = build_family(name)
    model = timm.create_model(name, num_classes=0, **SHAPE, patch_drop_rate=0.75)
    model.load_state_dict(reference.tensors, strict=True)
    model.train()  # patches are dropped only in training; nothing else is
    dropped = []
    model.patch_drop.register_forward_hook(lambda module, inputs, output: dropped.append(output[1]))
    with torch.no_grad():
        _, ((patches, prefix),) = model.forward_intermediates(
            IMAGES, indices=[TAP - 1], return_prefix_tokens=True, output_fmt="NLC", norm=False
        )
    (ids,) = dropped
    assert ids.shape == (2, 4)
    path = reference.save(tmp_path, reference.tensors)
    assert_close(features(load(reference, path), ids), torch.cat([prefix[:, :1], patches], dim=1))


def test_rotary_angles_stay_in_float32(tmp_path):
    reference = build_family("vit_small_patch16_dinov3")
    vit = load(reference, reference.save(tmp_path, reference.tensors), dtype="bf16").vit
    assert vit.rope.dtype == torch.float32 and not vit.rope.requires_grad
    assert {tensor.dtype for tensor in vit.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_small_patch14_reg4_dinov2"])
def test_dmae_compares_the_tokens_that_the_teacher_has(tmp_path, name):
    reference, config = (
        build_family(name),
        DmaeConfig(name="dmae", decoder=DecoderConfig(depth=1, embed_dim=16, num_heads=2), pairs=[(1, 2)]),
    )
    teacher = load(reference, reference.save(tmp_path, reference.tensors))
    generator = torch.Generator().manual_seed(0)
    student = build_student("vit_tiny_patch16_224", {**SHAPE, "embed_dim": 48}, generator=generator)
    objective = Dmae(
        config, student=student, teacher=TeacherShape(depth=3, embed_dim=32), generator=generator
    )
    target = teacher.features(batch())
    parts = objective(batch(), target)
    _, tapped = student(batch().visible, IDS, taps=[1])
    projected = objective.heads[0](tapped[1])
    compared = projected if reference.has_cls else projected[:, 1:]
    expected = distance("l1", compared, target["block/2"], normalize="none")
    torch.testing.assert_close(parts["align/1-2"], expected.detach())
    torch.testing.assert_close(parts["loss"].detach(), parts["pixel"] + parts["align/1-2"])
    parts["loss"].backward()
    assert objective.heads[0][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "name, words",
    [
        ("beit_base_patch16_224", ["Beit", "VisionTransformer", "Eva"]),
        ("vit_small_patch16_rope_mixed_224", ["vit_base_patch16_224"]),
        ("deit_tiny_distilled_patch16_224", ["embeds its patches"]),
        ("vit_srelpos_small_patch16_224", ["VisionTransformerRelPos"]),
        ("aimv2_large_patch14_224", ["patch projection"]),
        ("swin_tiny_patch4_window7_224", ["depth"]),
        ("vit_base_patch16_224.absent", ["(absent)", "timm.list_pretrained('vit_base_patch16_224*')"]),
    ],
)
def test_a_network_that_can_not_be_masked_is_refused(name, words):
    with refused("teacher", name, *words):
        build_timm_vit(name, SHAPE, depth=2, where="teacher")


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    """A module of the user's with networks.

    `net` has registers and rotary positions that are moved at random in training; the others can't be used.
    """
    (tmp_path / "my_lab_nets.py").write_text(
        "import timm, torch\n"
        "def net(**kwargs):\n"
        "    vit = timm.create_model('vit_small_patch16_dinov3', **kwargs)\n"
        "    vit.rope.rescale_coords, vit.rope.aug_active = 2.0, True\n"
        "    return vit\n"
        "class Stem(timm.layers.PatchEmbed):\n"
        "    pass\n"
        "def stem(**kwargs):\n"
        "    return timm.create_model('vit_tiny_patch16_224', embed_layer=Stem, **kwargs)\n"
        "def other(**kwargs):\n"
        "    return torch.nn.Linear(1, 1)\n"
        "def stiff(depth):\n"
        "    return None\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_lab_nets", None)


def test_a_network_of_the_users_own_is_built_by_import(tmp_path, my_lab):
    known = build_family("vit_small_patch16_dinov3")
    own = Reference(**{**vars(known), "name": "my_lab_nets:net"})
    path = known.save(tmp_path, known.tensors)
    for ids in (None, IDS):
        assert_close(features(load(own, path), ids), known.features(IMAGES, ids))


@pytest.mark.parametrize(
    "name, words",
    [
        ("my_lab_nets:other", ["Linear", "VisionTransformer", "Eva"]),
        ("my_lab_nets:stiff", ["unexpected keyword argument"]),
        ("my_lab_nets:stem", ["patch projection"]),
        ("my_lab_nets:absent", ["module:function"]),
        ("my_lab_nets:number", ["int"]),
    ],
)
def test_a_network_of_the_users_own_that_can_not_be_used_is_refused(my_lab, name, words):
    with refused("teacher", name, *words):
        build_timm_vit(name, SHAPE, depth=2, where="teacher")
