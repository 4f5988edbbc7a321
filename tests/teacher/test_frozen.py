"""The frozen teacher: only the needed blocks exist, and every needed tensor is the right one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from dmae_ds.config.load import load_config
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import build_timm_vit
from dmae_ds.objectives.feature_distillation import resolve_pairs
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.weights.named import open_weights
from tests.messages import refused
from tests.teacher.references import load_teacher
from tests.train.conftest import environment

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    state = {
        name: tensor.detach() + 0.1 * torch.randn_like(tensor)
        for name, tensor in timm.create_model(NAME, num_classes=0, **TINY).state_dict().items()
    }
    return state | {"decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 3)}


def load(path, *, format="timm", taps=("block/4",), dtype="fp32"):
    return load_teacher(
        NAME,
        TINY,
        whole_blocks=6,
        weights=open_weights(path, format),
        taps=taps,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def save(tmp_path, tensors, container="safetensors"):
    if container == "safetensors":
        save_file(tensors, tmp_path / "teacher.safetensors")
        return tmp_path / "teacher.safetensors"
    torch.save({"model": tensors} if container == "mae" else tensors, tmp_path / "teacher.pth")
    return tmp_path / "teacher.pth"


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[3, 0, 9], [15, 2, 4]])
    return PatchBatch(
        visible=torch.randn(2, 3, 8, 8, 3, generator=generator), masked=None, ids_keep=ids, ids_masked=None
    )


def test_a_cut_teacher_gives_the_features_of_a_whole_one_bit_for_bit(tmp_path, tensors):
    path = save(tmp_path, tensors)
    cut, whole = load(path, taps=("block/4",)), load(path, taps=("block/4", "block/6"))
    assert (cut.vit.depth, whole.vit.depth) == (4, 6)
    assert torch.equal(cut.features(batch())["block/4"], whole.features(batch())["block/4"])


def test_every_container_and_format_gives_the_same_features(tmp_path, tensors):
    expected = load(save(tmp_path, tensors)).features(batch())["block/4"]
    for container, format in (("timm", "timm"), ("mae", "mae")):
        teacher = load(save(tmp_path, tensors, container), format=format)
        assert torch.equal(teacher.features(batch())["block/4"], expected)


def test_blocks_above_the_cut_the_norm_and_the_decoder_do_not_exist(tmp_path, tensors):
    teacher = load(save(tmp_path, tensors))
    names = set(teacher.vit.state_dict())
    assert not any(
        name.startswith(("norm", "decoder", "mask_token", "blocks.4", "blocks.5")) for name in names
    )
    assert not any(parameter.requires_grad for parameter in teacher.vit.parameters())
    assert not teacher.vit.training
    assert teacher.parts.kept == sum(tensors[name].numel() for name in names)
    assert teacher.parts.kept + teacher.parts.dropped.parameters == sum(
        tensor.numel() for tensor in tensors.values()
    )


def test_bf16_features_are_close_to_those_of_fp32(tmp_path, tensors):
    path = save(tmp_path, tensors)
    full = load(path).features(batch())["block/4"]
    half = load(path, dtype="bf16").features(batch())["block/4"]
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("blocks.2.attn.qkv.weight"), ["missing 1: blocks.2.attn.qkv.weight"]),
        (
            lambda t: t.update({"patch_embed.proj.bias": torch.zeros(31)}),
            ["misshapen 1: patch_embed.proj.bias", [31], [32]],
        ),
        (lambda t: t.update({"blocks.1.extra": torch.zeros(1)}), ["unexpected 1: blocks.1.extra"]),
        (
            lambda t: t.update({"cls_tokn": t.pop("cls_token")}),
            ["missing 1: cls_token", "unexpected 1: cls_tokn"],
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.0")],
            ["missing 12: ", "..."],
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path, tensors, change, words):
    changed = dict(tensors)
    change(changed)
    with refused(*words):
        load(save(tmp_path, changed))


def test_the_huge_recipe_instantiates_24_of_32_blocks():
    config = load_config("dmae_vit_huge_to_base").teacher
    whole = meta_teacher(config.name, config.overrides())
    ((_, cut),) = resolve_pairs(None, student_depth=12, teacher_depth=whole.depth)
    vit = meta_teacher(config.name, config.overrides(), cut)
    width, patch, places = 1280, 14, 14 * 14 + 1
    # A block: qkv, projection, two MLP matrices = 12 D^2; their biases 9 D; two norms 4 D.
    expected = 24 * (12 * width**2 + 13 * width) + (3 * patch**2 + 1) * width + width + places * width
    assert (whole.depth, vit.depth) == (32, 24)
    assert sum(tensor.numel() for tensor in vit.state_dict().values()) == expected
    assert all(tensor.is_meta for tensor in vit.state_dict().values())


MEASURE = """
import os, sys, torch
from pathlib import Path
from dmae_ds.weights.named import open_weights
from dmae_ds.teacher.frozen import meta_teacher
from tests.teacher.references import load_teacher
name, depth, cut, path, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
def rss(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
meta_teacher(name, {})
before = rss("VmRSS:")
kwargs = {"weights": open_weights(Path(path), "timm"), "device": torch.device("cpu")}
teacher = load_teacher(name, {}, whole_blocks=depth, taps=(cut,), dtype=dtype, **kwargs)
needed = teacher.parts.kept * (4 if dtype == "fp32" else 2)
sum(float(parameter.sum()) for parameter in teacher.vit.parameters())  # touch every byte
print(needed, rss("VmRSS:") - before, rss("VmHWM:") - before)
"""


def measure_memory(tmp_path, name, depth, cut, dtype="fp32") -> tuple[int, int, int]:
    """Bytes that a new process needs, keeps, and has at its peak when it loads this teacher from a file."""
    path = tmp_path / f"{name}.safetensors"
    if not path.exists():
        save_file(
            {key: torch.zeros(tensor.shape) for key, tensor in build_timm_vit(name, {}).state_dict().items()},
            path,
        )
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(depth), cut, str(path), dtype],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    needed, kept, peak = map(int, output.stdout.split())
    return needed, kept, peak


CONSTANT = 64 << 20  # allocator and thread pools, whatever the teacher's size


def test_a_teacher_takes_the_memory_of_its_cut_and_no_more(tmp_path):
    needed, kept, peak = measure_memory(tmp_path, "vit_base_patch16_224", 12, "block/9")
    assert needed == pytest.approx(4 * 64.5e6, rel=0.01)
    assert kept <= 1.05 * needed + CONSTANT
    assert peak <= 1.05 * needed + CONSTANT


@pytest.mark.slow
def test_a_huge_teacher_takes_the_memory_of_its_cut_and_no_more(tmp_path):
    needed, kept, peak = measure_memory(tmp_path, "vit_huge_patch14_224", 32, "block/24")
    sizes = f"needed {needed / 2**30:.3f} GiB, kept {kept / 2**30:.3f}, peak {peak / 2**30:.3f}"
    print(f"\nViT-H cut at 24: {sizes}")
    assert max(kept, peak) <= 1.05 * needed + CONSTANT
