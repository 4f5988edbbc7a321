"""Values of a DeepSpeed JSON that do not go together: DeepSpeed ignores them, or stops with an assertion."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Iterator

from dmae_ds.errors import UserError

_FP32 = ("fp32", "float32", "float", "torch.float32")
_BF16 = ("bf16", "bfloat16", "torch.bfloat16")


def check_combinations(config: dict, path: Path, *, world_size: int, precision: str) -> None:
    """Raise UserError for the first combination in a completed config that DeepSpeed ignores or refuses."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    rules = (
        _offload(config, zero, stage),
        _gradients(config, zero, stage, precision),
        _partitions(zero, stage, world_size, precision),
        _modules(config),
    )
    for rule in rules:
        for problem in rule:
            raise UserError(f"{path}: {problem}")


def needs_grad_norm(config: dict) -> bool:
    """Whether DeepSpeed 0.19 requires the gradient's norm: ZeRO 1, bf16, accumulation in fp32."""
    is_bf16 = config["bf16"]["enabled"] and config.get("zero_optimization", {}).get("stage", 0) == 1
    return is_bf16 and config.get("data_types", {}).get("grad_accum_dtype") in _FP32


def _offload(config: dict, zero: dict, stage: int) -> Iterator[str]:
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = zero.get(key, {}).get("device", "none")
        where = f"zero_optimization.{key}"
        if device == "none":
            continue
        if stage < lowest:
            yield (
                f"{where}.device {device} requires zero_optimization.stage {lowest} or higher, "
                f"found {stage}; raise the stage, or remove {key}"
            )
        if device == "nvme" and stage != 3:
            yield f'{where}.device nvme requires zero_optimization.stage 3, found {stage}; write "cpu"'
        if device == "nvme" and not zero[key].get("nvme_path"):
            yield f"{where}.device nvme requires {where}.nvme_path; give a folder on the NVMe disk"
        if zero[key].get("ratio", 1) != 1:
            yield (
                f"{where}.ratio {zero[key]['ratio']:g} requires DeepSpeed's own Adam, and the recipe's "
                "`optim` is torch's; write 1, or remove it"
            )
        if key == "offload_optimizer" and config["zero_force_ds_cpu_optimizer"]:
            yield (
                "zero_force_ds_cpu_optimizer true requires DeepSpeed's own Adam, and the recipe's `optim` is "
                "torch's; write false, or remove it"
            )


def _gradients(config: dict, zero: dict, stage: int, precision: str) -> Iterator[str]:
    dtype = config.get("data_types", {}).get("grad_accum_dtype")
    model = {"bf16": _BF16, "fp16": ("fp16", "float16", "half", "torch.float16")}.get(precision, _FP32)
    if stage == 0 and dtype is not None and dtype not in model:
        yield (
            f"data_types.grad_accum_dtype {dtype} requires zero_optimization.stage 1 or higher with "
            f"precision {precision}; raise the stage, or remove it"
        )
    if not zero.get("compute_grad_norm", True):
        norm = "zero_optimization.compute_grad_norm false"
        if stage not in (1, 2):
            yield f"{norm} requires zero_optimization.stage 1 or 2, found {stage}; remove it"
        if config["gradient_clipping"] or precision == "fp16" or needs_grad_norm(config):
            yield f"{norm} does not go with optim.clip_grad, fp16, or fp32 sums of bf16; remove it"
    scatters = stage >= 2 and zero.get("reduce_scatter", True)
    for key, plain in (("prescale_gradients", False), ("gradient_predivide_factor", 1)):
        if scatters and config.get(key, plain) != plain:
            yield f"{key} {config[key]} requires zero_optimization.reduce_scatter false; remove {key}"


def _partitions(zero: dict, stage: int, world_size: int, precision: str) -> Iterator[str]:
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and (stage != 3 or world_size % size):
        yield (
            f"zero_optimization.zero_hpz_partition_size {size} requires stage 3 and a number of ranks that "
            f"it divides, found stage {stage} and {world_size} ranks; write 1"
        )
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if zero.get(key) and stage != 3:
            yield f"zero_optimization.{key} requires zero_optimization.stage 3, found {stage}; remove it"
    if zero.get("zero_quantized_weights") and precision == "bf16_autocast":
        yield (
            "zero_optimization.zero_quantized_weights does not go with precision bf16_autocast; "
            "remove it, or set precision=bf16"
        )
    if zero.get("zero_quantized_gradients") and not zero.get("reduce_scatter", True):
        yield "zero_optimization.zero_quantized_gradients requires reduce_scatter true; remove one of them"


def _modules(config: dict) -> Iterator[str]:
    """Names of classes are imported, which imports torch: few files have them."""
    for name in config["torch_autocast"].get("lower_precision_safe_modules", ()):
        module, _, attribute = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            yield (
                f"torch_autocast.lower_precision_safe_modules: '{name}' can't be imported ({error}); "
                "write names such as torch.nn.Linear"
            )
