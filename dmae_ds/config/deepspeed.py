"""Checks a DeepSpeed JSON and fills in what the recipe decides.

DeepSpeed accepts misspelt keys silently, and clips gradients at 1.0 by default. So every key is compared with
a table first, and batch sizes, clipping and precision always come from the recipe: in the JSON they may be
absent, "auto", or equal to the recipe's; anything else is an error that names both.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dmae_ds.config.shipped import find_file
from dmae_ds.errors import UserError

# DeepSpeed 0.19's keys that have an effect in this trainer; None: a plain value.
# `tests/config/test_deepspeed.py` compares the sections with the installed DeepSpeed's schema.
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        **dict.fromkeys(
            [
                "stage",
                "contiguous_gradients",
                "reduce_scatter",
                "reduce_bucket_size",
                "use_multi_rank_bucket_allreduce",
                "allgather_partitions",
                "allgather_bucket_size",
                "overlap_comm",
                "load_from_fp32_weights",
                "elastic_checkpoint",
                "sub_group_size",
                "round_robin_gradients",
                "zero_hpz_partition_size",
                "zero_quantized_weights",
                "zero_quantized_nontrainable_weights",
                "zero_quantized_gradients",
                "compute_grad_norm",
                "memory_efficient_linear",
                "pipeline_loading_checkpoint",
                "override_module_apply",
                "ignore_unused_parameters",
                "legacy_stage1",
                "stage3_prefetch_bucket_size",
                "stage3_param_persistence_threshold",
                "stage3_model_persistence_threshold",
                "stage3_max_live_parameters",
                "stage3_max_reuse_distance",
                "stage3_gather_16bit_weights_on_model_save",
                "stage3_module_granularity_threshold",
                "stage3_use_all_reduce_for_fetch_params",
                "stage3_allgather_sequential",
                "log_trace_cache_warnings",
                "enable_sanity_checks",
            ]
        ),
        "offload_param": dict.fromkeys(
            ["device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"]
        ),
        "offload_optimizer": dict.fromkeys(
            [
                "device",
                "nvme_path",
                "buffer_count",
                "pin_memory",
                "pipeline_read",
                "pipeline_write",
                "fast_init",
                "ratio",
            ]
        ),
    },
    "fp16": dict.fromkeys(
        [
            "enabled",
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
        ]
    ),
    "bf16": dict.fromkeys(["enabled", "immediate_grad_update", "check_grad_overflow"]),
    "torch_autocast": dict.fromkeys(["enabled", "dtype", "lower_precision_safe_modules"]),
    "aio": dict.fromkeys(
        ["block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"]
    ),
    "comms_logger": dict.fromkeys(["enabled", "verbose", "prof_all", "prof_ops", "debug"]),
    "data_types": dict.fromkeys(["grad_accum_dtype"]),
    "timers": {"throughput": dict.fromkeys(["enabled", "synchronized"])},
    # Without use_node_local_storage: all nodes share the run folder.
    "checkpoint": dict.fromkeys(["tag_validation", "parallel_write"]),
    **dict.fromkeys(
        [
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "steps_per_print",
            "wall_clock_breakdown",
            "memory_breakdown",
            "dump_state",
            "communication_data_type",
            "prescale_gradients",
            "gradient_predivide_factor",
            "disable_allgather",
            "disable_python_gc",
            "zero_allow_untested_optimizer",
            "zero_force_ds_cpu_optimizer",
        ]
    ),
}

# DeepSpeed's keys that have another place here.
OWNED_ELSEWHERE = {
    "optimizer": "the recipe's `optim` section",
    "scheduler": "the recipe's `optim` section",
    "tensorboard": "the recipe's `log.trackers`",
    "wandb": "the recipe's `log.trackers`",
    "csv_monitor": "RUN/metrics.jsonl",
    "amp": "the recipe's `precision`",
}


def load_deepspeed(
    name: str, *, micro_batch: int, accumulation: int, world_size: int, clip_grad: float, precision: str
) -> dict:
    """Read a DeepSpeed file and complete it for a run.

    name: a path, or the name of a shipped file; the other arguments come from the recipe
    Raises UserError for unreadable JSON, unknown keys (with the nearest known one) and conflicts with the
    recipe.
    """
    path = find_file("DeepSpeed file", name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}: found {type(config).__name__}, expected an object with keys such as zero_optimization"
        )
    _check_keys(config, KNOWN, path, prefix="")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; choose 0, 1, 2 or 3")
    if precision == "bf16" and stage == 0:
        # Measured with DeepSpeed 0.19.8: its first Adam update is about 3/4 of the right one.
        raise UserError(
            f"precision bf16 gives wrong updates in DeepSpeed under ZeRO 0 ({path.name}); "
            "use precision=bf16_autocast, or deepspeed=zero1 or higher"
        )
    for key, value, owner in _owned_by_recipe(micro_batch, accumulation, world_size, clip_grad, precision):
        _put(config, key.split("."), value, owner, path)
    _avoid_waits(config, world_size)
    return config


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
    if zero_stage(config) in (1, 2) and "offload_optimizer" not in zero:
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


def _check_keys(section: dict, known: dict, path: Path, prefix: str) -> None:
    for key, value in section.items():
        if key not in known:
            if not prefix and key in OWNED_ELSEWHERE:
                raise UserError(
                    f"{path}: '{key}' is set by {OWNED_ELSEWHERE[key]}; remove it from the DeepSpeed file"
                )
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            raise UserError(f"{path}: {prefix}{key} is unknown; {hint}")
        if isinstance(known[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {prefix}{key} is {value!r}, expected an object")
            _check_keys(value, known[key], path, prefix=f"{prefix}{key}.")


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
