"""Keys of a DeepSpeed JSON that have an effect in this trainer, each with the values it takes.

DeepSpeed accepts misspelt keys silently, and reads the values after the networks are built. So keys and
values are compared with this table first (deepspeed.py); `tests/config/test_deepspeed.py` compares the table
with the installed DeepSpeed's schema (0.19).
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field


def _whole(value: Any) -> Any:
    """JSON's 5e8 is a whole number, `true` is none."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _never(value: Any) -> Any:
    """Accelerate's "inf" for steps_per_print is a number that no step reaches."""
    return sys.maxsize if value in ("inf", float("inf")) else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Even = Annotated[int, BeforeValidator(_whole), Field(ge=0, multiple_of=2)]  # NCCL's 4-byte alignment
Number = Annotated[float, BeforeValidator(_whole), Field(ge=0, allow_inf_nan=False)]
Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_whole)]
Device = Literal["none", "cpu", "nvme"]
Words = list[str]
Dtype = Literal["fp32", "float32", "float", "torch.float32"]
Dtype |= Literal["bf16", "bfloat16", "torch.bfloat16", "fp16", "float16", "half", "torch.float16"]
CommunicationDtype = Annotated[
    Literal["fp32", "fp16", "bf16"],
    BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
]
TagValidation = Annotated[
    Literal["Ignore", "Warn", "Fail"],
    BeforeValidator(lambda value: value.capitalize() if isinstance(value, str) else value),
]

# {key: type of its value, or the keys of a section}
KNOWN: dict[str, Any] = {
    "zero_optimization": {
        "stage": Stage,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": Positive,
        "use_multi_rank_bucket_allreduce": bool,
        "allgather_partitions": bool,
        "allgather_bucket_size": Even,
        "overlap_comm": bool | None,
        "load_from_fp32_weights": bool,
        "elastic_checkpoint": bool,
        "sub_group_size": Positive,
        "round_robin_gradients": bool,
        "zero_hpz_partition_size": Positive,
        "zero_quantized_weights": bool,
        "zero_quantized_nontrainable_weights": bool,
        "zero_quantized_gradients": bool,
        "compute_grad_norm": bool,
        "memory_efficient_linear": bool,
        "pipeline_loading_checkpoint": bool,
        "override_module_apply": bool,
        "ignore_unused_parameters": bool,
        "legacy_stage1": bool,
        "stage3_prefetch_bucket_size": Whole,
        "stage3_param_persistence_threshold": Whole,
        "stage3_model_persistence_threshold": Whole,
        "stage3_max_live_parameters": Whole,
        "stage3_max_reuse_distance": Whole,
        "stage3_gather_16bit_weights_on_model_save": bool,
        "stage3_module_granularity_threshold": Whole,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
        "log_trace_cache_warnings": bool,
        "enable_sanity_checks": bool,
        "offload_param": {
            "device": Device,
            "nvme_path": str | None,
            "buffer_count": Positive,
            "buffer_size": Positive,
            "max_in_cpu": Whole,
            "pin_memory": bool,
        },
        "offload_optimizer": {
            "device": Device,
            "nvme_path": str | None,
            "buffer_count": Positive,
            "pin_memory": bool,
            "pipeline_read": bool,
            "pipeline_write": bool,
            "fast_init": bool,
            "ratio": Annotated[Number, Field(le=1)],
        },
    },
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "loss_scale": Number,
        "initial_scale_power": Annotated[Whole, Field(le=64)],
        "loss_scale_window": Positive,
        "hysteresis": Positive,
        "consecutive_hysteresis": bool,
        "min_loss_scale": Positive,
    },
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "torch_autocast": {"enabled": bool, "dtype": Dtype, "lower_precision_safe_modules": Words | None},
    "aio": {
        "block_size": Positive,
        "queue_depth": Positive,
        "intra_op_parallelism": Positive,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "comms_logger": {
        "enabled": bool,
        "verbose": bool,
        "prof_all": bool,
        "prof_ops": Words,
        "debug": bool,
    },
    "data_types": {"grad_accum_dtype": Dtype | None},
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    # Without use_node_local_storage: all nodes share the run folder.
    "checkpoint": {"tag_validation": TagValidation, "parallel_write": {"pipeline_stage": bool}},
    "train_batch_size": Positive,
    "train_micro_batch_size_per_gpu": Positive,
    "gradient_accumulation_steps": Positive,
    "gradient_clipping": Number,
    "steps_per_print": Annotated[int, BeforeValidator(_whole), BeforeValidator(_never), Field(ge=1)],
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "communication_data_type": CommunicationDtype | None,
    "prescale_gradients": bool,
    "gradient_predivide_factor": Annotated[Number, Field(gt=0)],
    "disable_allgather": bool,
    "disable_python_gc": bool,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
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

# Keys of older tutorials, and what is written today.
OLD_KEYS = {
    "cpu_offload": '"offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": '"offload_param": {"device": "cpu"}',
    "cpu_offload_params": '"offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": '"pin_memory" in offload_optimizer',
    "stage3_gather_fp16_weights_on_model_save": '"stage3_gather_16bit_weights_on_model_save"',
    "allgather_size": '"allgather_bucket_size" in zero_optimization',
    "bfloat16": '"bf16"',
}
