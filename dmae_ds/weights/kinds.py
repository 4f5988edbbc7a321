"""The kind of published file that a set of tensor names belongs to, in words for messages."""

from __future__ import annotations

import re
from typing import Iterable

# (pattern that some name matches, kind of file); the first that matches wins.
_KINDS = (
    (r"^decoder\.decoder_(embed|pred)", "transformers' ViT-MAE with its decoder (format hf)"),
    (
        r"^(\w+\.)?encoder\.layer\.\d+\.attention\.attention\.query",
        "transformers' ViT or DINOv2 encoder (format hf)",
    ),
    (r"^(model\.)?layer\.\d+\.attention\.q_proj", "transformers' DINOv3 (format hf)"),
    (r"^storage_tokens$", "a published DINOv3 (format dinov3)"),
    (r"^register_tokens$|^backbone\.", "a published DINOv2 (format dinov2)"),
    (
        r"^(visual\.)?transformer\.resblocks\.|^visual\.",
        "an OpenAI or OpenCLIP checkpoint; save its image tower under timm's names",
    ),
    (
        r"^student\.|^decoder\.blocks\.",
        "a file of ours without an encoder of its own; use student.safetensors",
    ),
    (r"^decoder_embed\.", "a whole MAE, encoder and decoder (format mae)"),
    (r"^(fc_norm|head)\.", "a classifier (format timm or mae): encoder and head, no decoder"),
    (r"^blocks\.0\.", "an encoder without a decoder"),
)


def describe_kind(names: Iterable[str]) -> str:
    """The kind of known file that has such tensor names; empty where none does."""
    names = list(names)
    for pattern, kind in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return kind
    return ""
