"""Checks a DeepSpeed JSON and fills in what the recipe decides.

DeepSpeed accepts misspelt keys silently, reads values after the networks are built, and clips gradients at
1.0 by default. So every key and value is compared with a table first (deepspeed_keys.py), and batch sizes,
clipping and precision always come from the recipe: in the JSON they may be absent, "auto", or equal to the
recipe's; anything else is an error that names both.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dmae_ds.config.deepspeed_keys import KNOWN, OLD_KEYS, OWNED_ELSEWHERE
from dmae_ds.config.deepspeed_rules import check_combinations, needs_grad_norm
from dmae_ds.config.shipped import find_file
from dmae_ds.errors import UserError


def load_deepspeed(
    name: str, *, micro_batch: int, accumulation: int, world_size: int, clip_grad: float, precision: str
) -> dict:
    """Read a DeepSpeed file and complete it for a run.

    name: a path, or the name of a shipped file; the other arguments come from the recipe
    Raises UserError for unreadable JSON, unknown keys (with the nearest known one), values that a key doesn't
    take, and conflicts with the recipe.
    """
    path = find_file("DeepSpeed file", name)
    config = _read(path)
    stage = zero_stage(config)
    if precision in ("bf16", "fp16") and stage == 0:
        # Measured on CPUs with DeepSpeed 0.19.8: its first Adam updates are 2/3 to 3/4 of the right ones.
        raise UserError(
            f"precision {precision} gives wrong updates in DeepSpeed under ZeRO 0 ({path.name}); "
            "use precision=bf16_autocast, or deepspeed=zero1 or higher"
        )
    for key, value, owner in _owned_by_recipe(micro_batch, accumulation, world_size, clip_grad, precision):
        _put(config, key.split("."), value, owner, path)
    # AdamW is the recipe's, torch's own; DeepSpeed refuses it next to offload_optimizer unless told so.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    check_combinations(config, path, world_size=world_size, precision=precision)
    _avoid_waits(config, world_size)
    return config


def _read(path: Path) -> dict:
    """Read a DeepSpeed file with checked keys and values, without those that are "auto" or null."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except ValueError as error:  # also of the encoding
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: found {type(config).__name__}, expected an object with keys such as zero_optimization"
        )
    return _checked(config, KNOWN, path, prefix="")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key '{key}' is given twice")
    return dict(pairs)


def _avoid_waits(config: dict, world_size: int) -> None:
    """Turn off what makes the host wait for the device in every step, unless the file asks for it.

    - DeepSpeed's throughput timer synchronises twice in a micro-batch; metrics.jsonl has images/s without it.
    - DeepSpeed reads the gradient's norm, to skip a step that is not finite. Only fp16 and clipping need it:
      bf16 and fp32 don't overflow, and a loss that is not finite ends a run with nothing saved
      (train/metrics.py). Neither ZeRO 3 nor an optimiser on the CPU has this switch.
    - overlap_comm synchronises once for each bucket of gradients; on one rank there is nothing to overlap.
    """
    config.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    zero = config.get("zero_optimization", {})
    if world_size == 1 and zero.get("overlap_comm"):
        zero["overlap_comm"] = False
    if config["fp16"]["enabled"] or config["gradient_clipping"]:
        return
    if zero_stage(config) in (1, 2) and "offload_optimizer" not in zero and not needs_grad_norm(config):
        zero.setdefault("compute_grad_norm", False)
    config["bf16"].setdefault("check_grad_overflow", False)


def zero_stage(config: dict) -> int:
    """ZeRO stage of a loaded config."""
    return config.get("zero_optimization", {}).get("stage", 0)


def check_compile(compile: bool, name: str, config: dict) -> None:
    """Raise UserError where `compile` is set under ZeRO 3, whose hooks a compiled block would skip."""
    if compile and zero_stage(config) == 3:
        raise UserError(
            f"compile=true does not work under ZeRO 3 ({name}), whose hooks a compiled block would skip; "
            "use deepspeed=zero2, or compile=false"
        )


def _checked(section: dict, known: dict, path: Path, prefix: str) -> dict:
    """Return a section with its values converted, and without keys that leave the choice to DeepSpeed."""
    checked = {}
    for key, value in section.items():
        if key not in known:
            raise UserError(f"{path}: {_explain_unknown(key, known, prefix)}")
        if value == "auto":
            continue
        if isinstance(known[key], dict):
            if value is None:
                continue
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key} is {value!r}, expected an object")
            checked[key] = _checked(value, known[key], path, prefix=f"{prefix}{key}.")
            continue
        try:
            value = TypeAdapter(known[key]).validate_python(value)
        except ValidationError as error:
            texts = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
            texts = [text for text in dict.fromkeys(texts) if text != "Input should be None"]
            expected = " or ".join(text[0].lower() + text[1:] for text in texts)
            raise UserError(f"{path}: {prefix}{key}: found {value!r}; {expected}") from None
        if value is not None:
            checked[key] = value
    return checked


def _explain_unknown(key: str, known: dict, prefix: str) -> str:
    if not prefix and key in OWNED_ELSEWHERE:
        return f"'{key}' is set by {OWNED_ELSEWHERE[key]}; remove it from the DeepSpeed file"
    if key in OLD_KEYS:
        return f"{prefix}{key} is DeepSpeed's old name; write {OLD_KEYS[key]}"
    near = get_close_matches(key, known, n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{prefix}{key} is unknown; {hint}"


def _owned_by_recipe(
    micro_batch: int, accumulation: int, world_size: int, clip_grad: float, precision: str
) -> list[tuple[str, Any, str]]:
    return [
        ("train_batch_size", micro_batch * accumulation * world_size, "optim.global_batch"),
        ("train_micro_batch_size_per_gpu", micro_batch, "optim.micro_batch"),
        ("gradient_accumulation_steps", accumulation, "optim.global_batch / (ranks x optim.micro_batch)"),
        ("gradient_clipping", clip_grad, "optim.clip_grad"),
        ("bf16.enabled", precision == "bf16", "precision"),
        ("fp16.enabled", precision == "fp16", "precision"),
        ("torch_autocast.enabled", precision == "bf16_autocast", "precision"),
        ("torch_autocast.dtype", "bfloat16", "precision"),
    ]


def _put(config: dict, keys: list[str], value: Any, owner: str, path: Path) -> None:
    *parents, last = keys
    for parent in parents:
        config = config.setdefault(parent, {})
    given = config.get(last, "auto")
    if given not in ("auto", value):
        raise UserError(
            f"{path}: {'.'.join(keys)} is {given!r}, but the recipe's {owner} gives {value!r}; "
            'remove it from the DeepSpeed file or write "auto"'
        )
    config[last] = value
