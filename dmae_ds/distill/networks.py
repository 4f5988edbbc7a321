"""The teacher of a file, a folder, a hub id or timm's name, found by its content; and the student by name."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import timm
import torch

from dmae_ds.config.distill_rules import Shape
from dmae_ds.config.networks import ModelConfig, looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT, build_student
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.tools.teacher_known import identify
from dmae_ds.weights.fit import check_fit
from dmae_ds.weights.hub import locate, locate_pretrained, timm_tag
from dmae_ds.weights.label import TEACHER

# Formats of networks that were trained on visible patches alone.
_DROPS_TOKENS = ("mae", "dmae_ds")
_HOW = "set teacher.name=NAME and its numbers, such as teacher.embed_dim=128 teacher.depth=8"


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher: its section of the recipe, its shape, and what it is.

    drops_tokens: whether it was trained on visible patches alone
    """

    section: dict[str, object]
    shape: Shape
    text: str
    drops_tokens: bool


def find_student(network: ModelConfig) -> MaskedViT:
    """Build a student on the meta device. Raises UserError with close names where timm doesn't know it."""
    if ":" not in network.name and not timm.is_model(network.name):
        raise UserError(
            f"--student '{network.name}' is unknown to timm {timm.__version__}; {_close(network.name)}"
        )
    return build_student(
        network.name, network.overrides(), generator=torch.Generator().manual_seed(0), device="meta"
    )


def find_teacher(word: str, given: dict[str, object], *, student: MaskedViT) -> FoundTeacher:
    """Identify a teacher, and set its image size so that its grid of patches is the student's.

    given: the user's own values of the recipe's teacher section: {"name": ..., "embed_dim": ...}
    Raises UserError where the word means nothing, or the file holds no network that is known.
    """
    path = Path(word).expanduser()
    is_place = path.exists() or (looks_like_hub_id(word) and not timm.is_model(word))
    if is_place:
        return _of_file(word, given, student)
    if timm.is_model(word):
        return _of_timm(word, given, student)
    raise UserError(
        f"--teacher '{word}' is neither a file or folder here, nor a hub id, nor timm's name; give the path "
        f"of a .safetensors or .pth file, or a name: {_close(word)}"
    )


def _of_file(word: str, given: dict[str, object], student: MaskedViT) -> FoundTeacher:
    path = locate(word, label=TEACHER)
    numbers = {key: value for key, value in given.items() if key in _NUMBERS}
    if "name" in given and "img_size" not in given:  # the file's own is found where the network is
        numbers |= _size_for(meta_teacher(given["name"], numbers), student)
    network = identify(
        path,
        name=given.get("name"),
        overrides=[f"{key}={value}" for key, value in numbers.items()],
        format=given.get("format", "auto"),
        how_to_name=_HOW,
    )
    weights = network.weights
    section = {
        "name": network.name,
        **network.overrides,
        "weights": str(Path(word).expanduser().resolve()) if Path(word).expanduser().exists() else word,
        "format": weights.format,
    }
    vit, size = _sized(section, network.vit, given, student)
    if size is not None:
        check_fit(vit.state_dict(), weights, depth=vit.depth, may_resize=True)
    pixels = _pixels(network.name) if weights.format == "timm" else {}
    section |= pixels
    drops_tokens = weights.format in _DROPS_TOKENS or any(name.startswith("decoder_") for name in weights)
    text = f"{_describe(network.name, vit)}, format {weights.format}, found by its content"
    if pixels:
        text += f"; pixels with mean {pixels['mean']}, std {pixels['std']}, as all of timm's weights for it"
    if network.others:
        text += f" (fits too: {', '.join(network.others)}; teacher.name= chooses)"
    return FoundTeacher(section, shape_of(vit), text + _describe_size(size), drops_tokens)


def _of_timm(name: str, given: dict[str, object], student: MaskedViT) -> FoundTeacher:
    tag = timm_tag(name)
    if "." not in name and tag is not None and tag.tag:
        name = f"{name}.{tag.tag}"
    section = {"name": name, "pretrained": True}
    overrides = {key: value for key, value in given.items() if key in _NUMBERS}
    vit, size = _sized(section, meta_teacher(name, overrides), given, student)
    locate_pretrained(name, label=TEACHER)
    text = f"{_describe(name, vit)}, timm's weights of that tag"
    return FoundTeacher(section, shape_of(vit), text + _describe_size(size), name.endswith(".mae"))


def _sized(
    section: dict[str, object], vit: MaskedViT, given: dict[str, object], student: MaskedViT
) -> tuple[MaskedViT, int | None]:
    """The teacher with the student's grid; sets section["img_size"], and returns it where it was changed."""
    size = {} if "img_size" in given else _size_for(vit, student)
    if not size:
        return vit, None
    section |= size
    numbers = {key: value for key, value in {**given, **section}.items() if key in _NUMBERS}
    return meta_teacher(section["name"], numbers), size["img_size"]


def _size_for(vit: MaskedViT, student: MaskedViT) -> dict[str, int]:
    """{"img_size": px} with which a teacher has the student's grid; {} where it has it already."""
    return {} if vit.grid == student.grid else {"img_size": student.grid[0] * vit.patch_size}


def _pixels(name: str) -> dict[str, object]:
    """The mean and std of a network that timm has with these alone, where they are not ImageNet's."""
    architecture = name.split(".")[0]
    tags = [timm_tag(full) for full in timm.list_pretrained(f"{architecture}.*")]
    statistics = {(tuple(tag.mean), tuple(tag.std)) for tag in tags if tag is not None}
    if len(statistics) != 1:
        return {}
    ((mean, std),) = statistics
    if (mean, std) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD):
        return {}
    return {"mean": list(mean), "std": list(std)}


def shape_of(vit: MaskedViT) -> Shape:
    """Width, depth and number of patches of a network."""
    return Shape(vit.embed_dim, vit.depth, vit.num_patches)


_NUMBERS = tuple(key for key in ModelConfig.model_fields if key != "name")


def _describe(name: str, vit: MaskedViT) -> str:
    return f"{name}: width {vit.embed_dim}, {vit.depth} blocks, patches of {vit.patch_size} px"


def _describe_size(size: int | None) -> str:
    return "" if size is None else f"; sees the student's grid, images of {size} px (teacher.img_size)"


def _close(name: str) -> str:
    known = timm.list_models(["vit*", "deit*", "eva*", "beit*"])
    near = get_close_matches(name.split(".")[0], known, n=4, cutoff=0.5)
    return f"similar names: {', '.join(near)}" if near else "see timm.list_models('vit*')"
