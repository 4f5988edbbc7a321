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
        ([1], ["list"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, config, words):
    with refused("ds.json", *words):
        load_deepspeed(write(tmp_path, config), **RECIPE)


def test_compile_under_zero_3_is_refused():
    for name, compile in (("zero3", False), ("zero2", True), ("zero0", True)):
        check_compile(compile, name, load_deepspeed(name, **RECIPE))
    with refused("compile", "zero3", "zero2"):
        check_compile(True, "zero3", load_deepspeed("zero3", **RECIPE))


def test_bf16_at_stage_0_is_refused_with_the_way_out():
    with refused("bf16", "zero0", "precision=bf16_autocast", "deepspeed=zero1"):
        load_deepspeed("zero0", **{**RECIPE, "precision": "bf16"})


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
