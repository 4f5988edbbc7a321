"""Tiny reference networks by name, and teachers of ours loaded from their files to compare with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Callable

import pytest
import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths
from dmae_ds.weights.fit import check_fit
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.named import Weights, open_weights
from tests.teacher.hf_networks import hf_networks
from tests.teacher.layouts import OTHERS
from tests.teacher.reference import TAP, Reference

TAPS = (f"block/{TAP}",)
ONE_OF_EACH = [
    "timm-pth",
    "mae",
    "dinov2-registers",
    "dinov2-giant",
    "dinov3",
    "dinov3-gated-qkvb",
    "dmae_ds",
    "hf-mae",
    "hf-dinov2-swiglu",
    "hf-dinov3",
]


@cache
def build_reference(what: str) -> Reference:
    torch.manual_seed(0)
    return (OTHERS if what in OTHERS else hf_networks(pytest.importorskip("transformers")))[what]()


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def load_teacher(
    name: str,
    overrides: dict,
    *,
    whole_blocks: int,
    weights: Weights,
    taps: tuple[str, ...],
    dtype: str,
    device: torch.device,
) -> FrozenTeacher:
    """A run's teacher before it is verified: the blocks up to the deepest tap, filled from an opened file."""
    vit = meta_teacher(name, overrides, needed_depths(taps, whole_blocks)[0])
    may_resize = "img_size" in overrides
    parts = fill(
        vit,
        weights,
        whole_blocks=whole_blocks,
        may_resize=may_resize,
        dtype=DTYPES[dtype],
        device=device,
        network=(name, overrides),
    )
    return FrozenTeacher(vit, taps, parts)


def load(
    reference: Reference,
    path: Path,
    format: str | None = None,
    *,
    taps: tuple[str, ...] = TAPS,
    dtype: str = "fp32",
) -> FrozenTeacher:
    return load_teacher(
        reference.name,
        reference.overrides,
        whole_blocks=3,
        weights=open_weights(path, format or reference.format, label=TEACHER),
        taps=taps,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@cache
def needed_by(name: str, shape: tuple) -> dict[str, Tensor]:
    return meta_teacher(name, dict(shape), TAP).state_dict()


def fit(reference: Reference, path: Path, format: str | None = None) -> None:
    """Check a file as loading does first, without building the network each time."""
    check_fit(
        needed_by(reference.name, tuple(reference.overrides.items())),
        open_weights(path, format or reference.format, label=TEACHER),
        depth=TAP,
        may_resize=False,
    )


def features(teacher: FrozenTeacher, ids: Tensor | None) -> Tensor:
    ids = torch.arange(16).expand(2, -1) if ids is None else ids
    visible = gather_patches(patchify(IMAGES, 8), ids)
    return teacher.features(PatchBatch(visible=visible, masked=None, ids_keep=ids, ids_masked=None))[
        "block/2"
    ]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def refusal(call: Callable, *arguments, **kwargs) -> str:
    """The one-line message with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(reference: Reference, folder: Path, change: str) -> dict[str, Tensor]:
    """The file's tensors with one matrix of the first block changed."""
    weights = open_weights(reference.save(folder, reference.tensors), reference.format)
    (key,) = weights.sources[f"blocks.0.{reference.first_matrix}.weight"].names
    tensors = dict(reference.tensors)
    if change == "removed":
        del tensors[key]
    elif change == "renamed":
        tensors[f"{key}x"] = tensors.pop(key)
    elif change == "transposed":
        tensors[key] = tensors[key].T.contiguous()
    elif change == "another":
        tensors[key.removesuffix("weight") + "bonus"] = torch.ones(3)
    return tensors
