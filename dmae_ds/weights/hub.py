"""Where a teacher's weights are: a path of yours, or a file of the Hugging Face hub, fetched once a machine.

Only plain file names of a hub's repository are fetched, never code; HF_HUB_OFFLINE=1 takes what is in the cache.
"""

from __future__ import annotations

from pathlib import Path

import timm
from timm.models import PretrainedCfg

from dmae_ds.config.run import TeacherConfig, looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.weights.containers import parts_of_index

FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def locate(config: TeacherConfig) -> Path:
    """The file or folder of this teacher's weights, on this machine. Raises UserError."""
    if config.pretrained:
        return _fetch(_timm_repository(config.name), f"teacher.name '{config.name}' (pretrained)")
    path = Path(config.weights).expanduser()
    if not path.exists() and looks_like_hub_id(config.weights):
        return _fetch(config.weights, f"teacher.weights '{config.weights}'")
    return path


def pixel_statistics(config: TeacherConfig, mean: tuple, std: tuple) -> tuple[tuple, tuple]:
    """The mean and std that the teacher's pixels are normalised with: its own, its timm tag's, or the data's."""
    if config.mean is not None:
        return config.mean, config.std
    tagged = _timm_tag(config.name) if "." in config.name and ":" not in config.name else None
    return (tuple(tagged.mean), tuple(tagged.std)) if tagged is not None else (mean, std)


def _timm_repository(name: str) -> str:
    known = _timm_tag(name)
    if known is None or not known.hf_hub_id:
        raise UserError(
            f"teacher.name '{name}' has no weights on the hub that timm knows; give teacher.weights, or a tag of timm.list_pretrained()"
        )
    return known.hf_hub_id


def _timm_tag(name: str) -> PretrainedCfg | None:
    """What timm knows of a tagged name's weights."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # a network that it knows, without this tag
        return None


def _fetch(repository: str, who: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reason = None
    for name in FILES:
        try:
            path = Path(hf_hub_download(repository, name))
            if name.endswith(".index.json"):
                for part in parts_of_index(path):
                    hf_hub_download(repository, part)
            return path
        except LocalEntryNotFoundError as error:  # unreachable, or offline and not in the cache
            reason = reason or error
        except EntryNotFoundError:
            continue
        except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
            reason = error
            break
    reason = (reason.__cause__ or reason) if reason else None
    said = (
        (str(reason).splitlines() or [type(reason).__name__])[0][:160]
        if reason
        else f"it holds none of {', '.join(FILES)}"
    )
    raise UserError(
        f"{who} is no file here, and {repository} could not be fetched from the hub ({said}); give the path of a file or folder"
    )
