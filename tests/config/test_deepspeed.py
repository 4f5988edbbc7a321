"""DeepSpeed files: every key is known, and batch, clipping and precision are the recipe's."""

from __future__ import annotations

import json

import pytest

from dmae_ds.config.deepspeed import KNOWN, check_compile, load_deepspeed
from dmae_ds.config.shipped import shipped_files
from tests.messages import refused

RECIPE = {"micro_batch": 4, "accumulation": 2, "world_size": 3, "clip_grad": 0.0, "precision": "fp32"}


def write(tmp_path, config) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize("name", shipped_files("DeepSpeed file"))
def test_shipped_files_take_batch_clipping_and_precision_from_the_recipe(name):
    config = load_deepspeed(name, **{**RECIPE, "precision": "bf16_autocast"})
    assert (
        config["train_batch_size"],
        config["train_micro_batch_size_per_gpu"],
        config["gradient_accumulation_steps"],
    ) == (24, 4, 2)
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    assert (config["bf16"]["enabled"], config["torch_autocast"]["enabled"]) == (False, True)


def test_auto_and_equal_values_are_taken(tmp_path):
    path = write(
        tmp_path, {"train_batch_size": "auto", "gradient_clipping": 0.0, "bf16": {"enabled": "auto"}}
    )
    assert load_deepspeed(path, **RECIPE)["train_batch_size"] == 24


@pytest.mark.parametrize(
    "config, words",
    [
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "zero_optimization?"]),
        ({"zero_optimization": {"stgae": 2}}, ["zero_optimization.stgae", "zero_optimization.stage?"]),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            ["offload_optimizer.devise", "zero_optimization.offload_optimizer.device?"],
        ),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", 4, "0, 1, 2 or 3"]),
        ({"zero_optimization": 2}, ["zero_optimization", "object"]),
        ({"train_batch_size": 64}, ["train_batch_size", 64, "optim.global_batch", 24]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping", 1.0, "optim.clip_grad", 0.0]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", True, "precision", False]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "`optim`"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
        ({"zero_optimization": True}, ["zero_optimization", "object"]),
        ([1], ["list"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, config, words):
    with refused("ds.json", *words):
        load_deepspeed(write(tmp_path, config), **RECIPE)


def zero(**keys) -> dict:
    return {"zero_optimization": {"stage": 2, **keys}}


@pytest.mark.parametrize(
    "config, words",
    [
        (zero(reduce_bucket_size=15099494.4), ["zero_optimization.reduce_bucket_size", 15099494.4]),
        (zero(reduce_bucket_size=0), ["zero_optimization.reduce_bucket_size", "found 0"]),
        (zero(allgather_bucket_size=-2), ["allgather_bucket_size", "found -2"]),
        (zero(allgather_bucket_size=1001), ["allgather_bucket_size", 1001, "multiple of 2"]),
        (zero(overlap_comm="maybe"), ["overlap_comm", "'maybe'", "boolean"]),
        (zero(sub_group_size="1GB"), ["sub_group_size", "'1GB'"]),
        (zero(stage=True), ["zero_optimization.stage", True]),
        (zero(stage="2"), ["zero_optimization.stage", "'2'", "0, 1, 2 or 3"]),
        (zero(offload_optimizer={"device": "cpuu"}), ["offload_optimizer.device", "'cpuu'", "'cpu'"]),
        (zero(offload_optimizer={"device": "cpu", "pin_memory": 7}), ["offload_optimizer.pin_memory", 7]),
        ({"steps_per_print": "often"}, ["steps_per_print", "'often'"]),
        ({"communication_data_type": "fp8"}, ["communication_data_type", "'fp8'", "'bf16'"]),
        ({"checkpoint": {"tag_validation": "maybe"}}, ["checkpoint.tag_validation", "'maybe'", "'Warn'"]),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, ["data_types.grad_accum_dtype", "'fp64'"]),
        ({"fp16": {"loss_scale": float("inf")}}, ["fp16.loss_scale", "inf"]),
        ({"wall_clock_breakdown": [1]}, ["wall_clock_breakdown", [1]]),
        ({"prescale_gradients": None}, ["prescale_gradients", None]),
    ],
)
def test_a_value_that_a_key_does_not_take_is_one_line(tmp_path, config, words):
    with refused("ds.json", *words):
        load_deepspeed(write(tmp_path, config), **RECIPE)


@pytest.mark.parametrize(
    "config, words",
    [
        (zero(stage=0, offload_optimizer={"device": "cpu"}), ["offload_optimizer", "stage 1", "found 0"]),
        (zero(offload_param={"device": "cpu"}), ["offload_param", "stage 3", "found 2"]),
        (zero(offload_optimizer={"device": "nvme", "nvme_path": "/x"}), ["nvme", "stage 3"]),
        (zero(stage=3, offload_param={"device": "nvme"}), ["nvme", "offload_param.nvme_path"]),
        (zero(stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5}), ["ratio", 0.5]),
        (
            {**zero(offload_optimizer={"device": "cpu"}), "zero_force_ds_cpu_optimizer": True},
            ["zero_force_ds_cpu_optimizer", "optim"],
        ),
        (zero(stage=3, compute_grad_norm=False), ["compute_grad_norm", "stage 1 or 2"]),
        (zero(stage=3, zero_hpz_partition_size=2), ["zero_hpz_partition_size 2", "3 ranks"]),
        (zero(stage=2, zero_hpz_partition_size=3), ["zero_hpz_partition_size 3", "stage 2"]),
        ({**zero(), "prescale_gradients": True}, ["prescale_gradients", "reduce_scatter"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype bf16", "stage 1"]),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["json.Linear"]}},
            ["lower_precision_safe_modules", "json.Linear"],
        ),
    ],
)
def test_values_that_do_not_go_together_are_one_line(tmp_path, config, words):
    with refused("ds.json", *words):
        load_deepspeed(write(tmp_path, config), **RECIPE)


def test_secondary_partitions_of_a_size_that_divides_the_ranks_are_taken(tmp_path):
    config = load_deepspeed(write(tmp_path, zero(stage=3, zero_hpz_partition_size=3)), **RECIPE)
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 3


def test_spellings_that_deepspeed_takes_are_taken(tmp_path):
    given = {
        **zero(
            stage=2.0, reduce_bucket_size=5e8, overlap_comm=None, offload_param=None, sub_group_size="auto"
        ),
        "steps_per_print": "inf",
        "communication_data_type": None,
        "aio": {"block_size": 1048576.0},
    }
    config = load_deepspeed(write(tmp_path, given), **RECIPE)
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 500_000_000,
        "compute_grad_norm": False,
    }
    assert config["aio"] == {"block_size": 1048576} and config["steps_per_print"] > 10**9
    assert "communication_data_type" not in config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_on_the_cpu_needs_no_further_key(tmp_path, stage):
    given = zero(stage=stage, offload_optimizer={"device": "cpu", "pin_memory": True})
    assert load_deepspeed(write(tmp_path, given), **RECIPE)["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    "text",
    [
        '{"fp16": {}, "fp16": {}}',
        '{"zero_optimization": {"stage": 1, "stage": 2}}',
        '{"aio": {"block_size": 1, "queue_depth": 2, "block_size": 1}}',
    ],
)
def test_a_key_that_is_given_twice_is_one_line(tmp_path, text):
    (tmp_path / "ds.json").write_text(text)
    with refused("ds.json", "twice"):
        load_deepspeed(str(tmp_path / "ds.json"), **RECIPE)


def test_ops_that_this_machine_cannot_have_are_one_line(tmp_path, monkeypatch):
    import torch

    from dmae_ds.train import engine

    cpu = torch.device("cpu")
    plain = load_deepspeed("zero3", **RECIPE)
    engine.check_ops(plain, cpu)
    assert engine.get_op_builder("CPUAdamBuilder").NAME == "cpu_adam"
    quantized = write(tmp_path, zero(stage=3, zero_quantized_weights=True))
    with refused("zero_quantized_weights", "GPU"):
        engine.check_ops(load_deepspeed(quantized, **RECIPE), cpu)
    monkeypatch.setattr(engine, "get_op_builder", lambda name: None)
    on_disk = write(tmp_path, zero(stage=3, offload_param={"device": "nvme", "nvme_path": str(tmp_path)}))
    with refused("nvme", "async_io", "cpu"):
        engine.check_ops(load_deepspeed(on_disk, **RECIPE), cpu)


def test_compile_under_zero_3_is_refused():
    for name, compile in (("zero3", False), ("zero2", True), ("zero0", True)):
        check_compile(compile, name, load_deepspeed(name, **RECIPE))
    with refused("compile", "zero3", "zero2"):
        check_compile(True, "zero3", load_deepspeed("zero3", **RECIPE))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_at_stage_0_is_refused_with_the_way_out(precision):
    with refused(precision, "zero0", "precision=bf16_autocast", "deepspeed=zero1"):
        load_deepspeed("zero0", **{**RECIPE, "precision": precision})
    assert load_deepspeed("zero1", **{**RECIPE, "precision": precision})[precision]["enabled"]


def test_garbage_is_one_line(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{")
    with refused("ds.json", "JSON"):
        load_deepspeed(str(path), **RECIPE)


def test_the_table_names_nothing_that_deepspeed_does_not_have():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = KNOWN["zero_optimization"]
    for known, schema in (
        (zero, DeepSpeedZeroConfig),
        (zero["offload_param"], DeepSpeedZeroOffloadParamConfig),
        (zero["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
    ):
        theirs = set(schema.model_fields) | {
            field.alias for field in schema.model_fields.values() if field.alias
        }
        assert set(known) <= theirs


def test_waits_of_the_host_are_turned_off_unless_the_file_asks_for_them(tmp_path):
    def zero_of(name, **changes):
        return load_deepspeed(name, **{**RECIPE, "world_size": 1, **changes})["zero_optimization"]

    assert zero_of("zero2")["compute_grad_norm"] is False and zero_of("zero2")["overlap_comm"] is False
    assert zero_of("zero2", world_size=3)["overlap_comm"] is True  # there is something to overlap
    assert "compute_grad_norm" not in zero_of("zero2", clip_grad=1.0)  # the norm is needed
    assert "compute_grad_norm" not in zero_of("zero2", precision="fp16")
    assert "compute_grad_norm" not in zero_of("zero3")  # DeepSpeed refuses it
    assert load_deepspeed("zero0", **RECIPE)["timers"] == {"throughput": {"enabled": False}}
    asked = write(
        tmp_path,
        {
            "zero_optimization": {"stage": 1, "compute_grad_norm": True},
            "timers": {"throughput": {"enabled": True}},
        },
    )
    assert zero_of(asked)["compute_grad_norm"] is True
    assert load_deepspeed(asked, **RECIPE)["timers"]["throughput"]["enabled"] is True
