"""Find a weights file on this machine: a path of the user's, or a file of the Hugging Face hub, fetched once.

Only plain file names of a hub's repository are fetched, never code. HF_HUB_OFFLINE=1 takes what is cached.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.config.networks import looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.weights.label import WEIGHTS, Label

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def locate(weights: str, *, label: Label = WEIGHTS) -> Path:
    """The file or folder that a path or a hub id (`owner/name`) means.

    A hub's file is fetched. Raises UserError where it can't be.
    """
    path = Path(weights).expanduser()
    if not path.exists() and looks_like_hub_id(weights):
        return _fetch(weights, f"{label.weights} '{weights}'", label)
    return path


def locate_pretrained(name: str, *, label: Label = WEIGHTS) -> Path:
    """The file of timm's weights for a tagged name such as vit_large_patch16_224.mae. Raises UserError."""
    tag = timm_tag(name)
    if tag is None or not tag.hf_hub_id:
        raise UserError(
            f"{label.name} '{name}' has no weights on the hub that timm knows; give {label.weights}, or a "
            "tag of timm.list_pretrained()"
        )
    return _fetch(tag.hf_hub_id, f"{label.name} '{name}' (pretrained)", label)


def timm_tag(name: str) -> PretrainedCfg | None:
    """timm's entry for a tagged name; None for a network that it knows without this tag."""
    import timm

    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        return None


def _fetch(repository: str, asked_for: str, label: Label) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    error: Exception | None = None
    for name in FILES:
        try:
            path = Path(hf_hub_download(repository, name))
            if name.endswith(".index.json"):
                from dmae_ds.weights.containers import read_index

                for part in read_index(path, label=label):
                    hf_hub_download(repository, part)
            return path
        except LocalEntryNotFoundError as unreachable:  # or offline and not in the cache
            error = error or unreachable
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as failed:
            error = failed
            break
    reason = f"it holds none of {', '.join(FILES)}" if error is None else _first_line(error)
    raise UserError(
        f"{asked_for} was not found here, and {repository} could not be fetched from the hub ({reason}); "
        "give the path of a file or folder"
    )


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).splitlines() or [type(cause).__name__]
    return lines[0][:160]
