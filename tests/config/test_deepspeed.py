"""DeepSpeed files: every key is known, and the recipe's numbers are the only ones."""

from __future__ import annotations

import json

import pytest

from dmae_ds.config.deepspeed import KNOWN, load_deepspeed
from dmae_ds.config.shipped import shipped_files
from dmae_ds.errors import UserError

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
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"stgae": 2}}, "did you mean zero_optimization.stage?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "did you mean zero_optimization.offload_optimizer.device?",
        ),
        ({"zero_optimization": {"stage": 4}}, "choose 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "expected an object"),
        ({"train_batch_size": 64}, "train_batch_size is 64, but the recipe's optim.global_batch gives 24"),
        ({"gradient_clipping": 1.0}, "the recipe's optim.clip_grad gives 0.0"),
        ({"bf16": {"enabled": True}}, "the recipe's precision gives False"),
        ({"optimizer": {"type": "Adam"}}, "belongs to the recipe's `optim` section"),
        ([1], "found list"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, config, words):
    with pytest.raises(UserError) as caught:
        load_deepspeed(write(tmp_path, config), **RECIPE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bf16_at_stage_0_is_refused_with_the_way_out():
    with pytest.raises(UserError, match="precision=bf16_autocast, or deepspeed=zero1"):
        load_deepspeed("zero0", **{**RECIPE, "precision": "bf16"})


def test_garbage_is_one_line(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
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


def test_what_makes_the_host_wait_is_left_out_unless_the_file_asks_for_it(tmp_path):
    alone = {**RECIPE, "world_size": 1}
    zero = load_deepspeed("zero2", **alone)["zero_optimization"]
    assert zero["compute_grad_norm"] is False and zero["overlap_comm"] is False
    assert (
        load_deepspeed("zero2", **RECIPE)["zero_optimization"]["overlap_comm"] is True
    )  # several ranks: there is something to overlap
    assert load_deepspeed("zero0", **alone)["timers"] == {"throughput": {"enabled": False}}
    assert (
        "compute_grad_norm" not in load_deepspeed("zero2", **{**alone, "clip_grad": 1.0})["zero_optimization"]
    )  # the norm is needed
    assert (
        "compute_grad_norm"
        not in load_deepspeed("zero2", **{**alone, "precision": "fp16"})["zero_optimization"]
    )
    assert (
        "compute_grad_norm" not in load_deepspeed("zero3", **alone)["zero_optimization"]
    )  # DeepSpeed refuses it
    asked = write(
        tmp_path,
        {
            "zero_optimization": {"stage": 1, "compute_grad_norm": True},
            "timers": {"throughput": {"enabled": True}},
        },
    )
    config = load_deepspeed(asked, **alone)
    assert (
        config["zero_optimization"]["compute_grad_norm"] is True
        and config["timers"]["throughput"]["enabled"] is True
    )
