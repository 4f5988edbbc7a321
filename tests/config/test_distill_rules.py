"""The rules that choose a recipe's keys: the paper's own case, small cases, and what every case must keep."""

from __future__ import annotations

import itertools

import pytest

from dmae_ds.config.distill_rules import (
    OBJECTIVE,
    Facts,
    Shape,
    block_flops,
    choose,
    choose_ranks,
    decoder_share,
)
from dmae_ds.config.load import build_config
from dmae_ds.config.run import RunConfig
from tests.messages import refused

TINY, SMALL, BASE, LARGE = (Shape(w, d, 196) for w, d in ((192, 12), (384, 12), (768, 12), (1024, 24)))


def facts(**changes) -> Facts:
    values = {
        "num_images": 180,
        "student": SMALL,
        "teacher": BASE,
        "drops_tokens": False,
        "can_measure_loss": True,
        "num_ranks": 1,
        "num_gpus": 0,
        "num_cores": 2,
    }
    return Facts(**{**values, **changes})


def chosen(given=None, **changes) -> dict[str, object]:
    return {choice.key: choice.value for choice in choose(facts(**changes), given or {})}


def test_the_papers_case_gets_the_papers_settings():
    values = chosen(
        num_images=1_281_167, student=BASE, teacher=LARGE, drops_tokens=True, num_ranks=8, num_gpus=8
    )
    assert values["optim.global_batch"] == 4096 and values["optim.base_lr"] == 1.5e-4
    assert values["optim.epochs"] == 100 and values["optim.warmup_epochs"] == 20
    names = ("depth", "embed_dim", "num_heads")
    assert [values[f"objective.decoder.{name}"] for name in names] == [8, 512, 16]
    assert values["teacher.sees"] == "visible" and "teacher.standardize" not in values
    assert values["precision"] == "bf16_autocast" and "optim.micro_batch" not in values


def test_a_few_images_on_a_cpu_take_minutes_and_the_cut_is_said():
    choices = {choice.key: choice for choice in choose(facts(), {})}
    epochs = choices["optim.epochs"]
    assert 1 <= epochs.value < 100 and "--epochs 1600" in epochs.reason and "10 minutes" in epochs.reason
    assert choices["optim.global_batch"].value == 16
    assert choices["teacher.sees"].value == "all" and choices["teacher.standardize"].value == "layer_norm"
    assert "11%" in choices["objective.decoder.num_heads"].reason
    assert chosen(num_cores=10_000)["optim.epochs"] == 1600
    assert chosen(num_images=10**6)["optim.epochs"] == 1  # at least one, however long it takes


def test_a_whole_decoder_is_most_of_a_small_students_work():
    assert 0.65 < decoder_share(facts(), width=512, depth=8, sees="visible") < 0.75
    assert decoder_share(facts(), width=256, depth=4, sees="visible") < 0.3


def test_what_is_given_stays_and_the_rest_follows_it():
    given = {"optim.global_batch": 64, "optim.epochs": 2.0, "teacher.sees": "visible"}
    values = chosen(given)
    assert not given.keys() & values.keys() and "teacher.standardize" not in values
    assert values["optim.base_lr"] == pytest.approx(chosen()["optim.base_lr"] / 2, rel=0.05)
    assert values["optim.warmup_epochs"] == pytest.approx(0.4)
    assert values["optim.micro_batch"] == 32  # CPUs
    wide = chosen({"objective.decoder.embed_dim": 512})
    assert wide["objective.decoder.num_heads"] == 16


CASES = list(
    itertools.product(
        (2, 7, 180, 5000, 100_000, 1_281_167), (TINY, SMALL, BASE), ((0, 1), (0, 2), (3, 3), (8, 8)), (1, 64)
    )
)


def test_every_case_is_a_recipe():
    for num_images, student, (num_gpus, num_ranks), cores in CASES:
        if num_images < num_ranks:
            continue
        values = {
            "run": {"dir": "x"},
            "student": {"name": "vit_small_patch16_224"},
            "teacher": {"name": "vit_base_patch16_224", "weights": "x"},
            "objective": {"name": OBJECTIVE},
            "data": {"train": "x", "val": "x"},
        }
        for key, value in chosen(
            num_images=num_images, student=student, num_gpus=num_gpus, num_ranks=num_ranks, num_cores=cores
        ).items():
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        config = build_config(values, [], schema=RunConfig)
        decoder = config.objective.decoder
        assert config.optim.global_batch % num_ranks == 0 and decoder.embed_dim % decoder.num_heads == 0
        assert config.optim.global_batch <= max(num_images, num_ranks)
        assert 0 < config.optim.warmup_epochs < config.optim.epochs and config.optim.base_lr > 0


def test_ranks_are_those_of_the_machine_and_divide_a_batch_that_is_known():
    assert [choose_ranks(num_gpus=0, num_cores=cores) for cores in (1, 2, 16, 64)] == [1, 1, 2, 8]
    assert choose_ranks(num_gpus=6, num_cores=64) == 6
    assert choose_ranks(num_gpus=6, num_cores=64, global_batch=64) == 4
    with refused("3", "8", "--ranks"):
        chosen(num_images=3, num_ranks=8)


def test_the_work_is_what_torch_counts():
    from dmae_ds.plan.geometry import measure

    values = {
        "run": {"dir": "x"},
        "student": {"name": "vit_small_patch16_224", "depth": 2},
        "teacher": {"name": "vit_base_patch16_224", "depth": 2, "weights": "x"},
        "objective": {"name": OBJECTIVE, "decoder": {"depth": 1, "embed_dim": 256, "num_heads": 8}},
        "data": {"train": "x"},
    }
    geometry = measure(build_config(values, [], schema=RunConfig), 1)
    student = 2 * block_flops(384, 50) + block_flops(256, 197)
    outside = 2 * (49 * 768 * 384 + 197 * 384 * 256 + 147 * 256 * 768 + 49 * (384 + 768) * 768)
    assert geometry.student.forward_flops == pytest.approx(student + outside, rel=0.1)
    assert geometry.teachers[""].flops == pytest.approx(block_flops(768, 50) + 2 * 49 * 768 * 768, rel=0.05)
