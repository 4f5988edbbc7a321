"""Parameter groups, rates and steps compared with numbers of the published fine-tuning and probing code."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from dmae_ds.config.evaluation import FinetuneConfig, FinetuneOptimConfig, LinearConfig, LinearOptimConfig
from dmae_ds.config.load import load_config
from dmae_ds.config.networks import ModelConfig
from dmae_ds.finetune.linear import LinearProbe
from dmae_ds.finetune.loop import take_step
from dmae_ds.finetune.network import build_classifier, classifier_kwargs
from dmae_ds.finetune.optim import build_adamw, build_lars, layer_groups
from dmae_ds.finetune.tasks import build_task
from dmae_ds.train.learning_rate import learning_rate, peak_lr

TINY = ModelConfig(name="vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3)
STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FILLED = {
    "run": {"dir": "out"},
    "weights": "file",
    "network": {"name": "vit_base_patch16_224"},
    "data": {"train": "train"},
}


@pytest.fixture(scope="session")
def numbers(oracles):
    return load_file(oracles / "finetune.safetensors")


@pytest.fixture(scope="session")
def schedules(oracles):
    return json.loads((oracles / "finetune_schedules.json").read_text())


def recipe(name):
    """Load a shipped recipe like the command does."""
    if name.startswith("dmae"):
        return load_config(name, ["teacher.weights=file"])
    schema = LinearConfig if name.startswith("linear") else FinetuneConfig
    return load_config(name, schema=schema, kind="evaluation recipe", below=FILLED)


def tiny(numbers, pool):
    """The oracle's network, built by the function that `eval finetune` uses."""
    model = build_classifier(
        TINY, classifier_kwargs({"gap": "mean", "cls": "cls"}[pool], 10), seed=0, **STATISTICS
    )
    model.load_state_dict(
        {
            name.removeprefix(f"{pool}.init."): tensor
            for name, tensor in numbers.items()
            if name.startswith(f"{pool}.init.")
        },
        strict=True,
    )
    return model


@pytest.mark.parametrize("name, decay", [("finetune_mae", "0.65"), ("finetune_dmae", "0.75")])
def test_vit_b_has_the_published_groups_and_drop_path(schedules, name, decay):
    config = recipe(name)
    with torch.device("meta"):
        model = build_classifier(
            config.network,
            classifier_kwargs(config.pool, 1000, drop_path=config.drop_path),
            seed=0,
            **STATISTICS,
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, weight_decay=config.optim.weight_decay, layer_decay=config.optim.layer_decay)
    actual = sorted(
        (
            group["lr_scale"],
            group["weight_decay"],
            sorted(names[id(parameter)] for parameter in group["params"]),
        )
        for group in groups
    )
    expected = sorted(
        (group["lr_scale"], group["weight_decay"], sorted(group["params"]))
        for group in schedules[f"vit_b_groups_{decay}"]
    )
    assert [row[1:] for row in actual] == [row[1:] for row in expected]
    assert [row[0] for row in actual] == pytest.approx([row[0] for row in expected], rel=1e-12)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx(
        [config.drop_path / 0.1 * rate for rate in schedules["drop_path_vit_b_0.1"]], abs=1e-7
    )


def test_the_final_norm_before_the_head_has_the_head_s_rate():
    """The published code and timm's own grouping differ here."""
    model = build_classifier(TINY, classifier_kwargs("cls", 10), seed=0, **STATISTICS)
    groups = layer_groups(model, weight_decay=0.05, layer_decay=0.5)
    assert (
        next(
            group["lr_scale"]
            for group in groups
            if any(parameter is model.norm.weight for parameter in group["params"])
        )
        == 1.0
    )


@pytest.mark.parametrize(
    "name, schedule",
    [
        ("finetune_mae", "lr_finetune_mae_100ep"),
        ("finetune_dmae", "lr_finetune_dmae_100ep"),
        ("linear_mae", "lr_linprobe_90ep"),
        ("dmae_vit_large_to_base", "lr_dmae_pretrain_100ep"),
    ],
)
def test_the_rate_at_every_listed_epoch(schedules, name, schedule):
    optim, expected = recipe(name).optim, schedules[schedule]
    assert {
        "lr": peak_lr(optim),
        **{key: getattr(optim, key) for key in ("warmup_epochs", "epochs", "min_lr")},
    } == pytest.approx(expected["cfg"])
    for epoch, lr in expected["values"]:
        assert learning_rate(optim, epoch) == pytest.approx(lr, rel=1e-9, abs=1e-15), epoch


@pytest.mark.parametrize("pool", ["gap", "cls"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_three_steps_of_fine_tuning(numbers, schedules, pool, accumulation):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = tiny(numbers, pool)
    task = build_task(
        model, nn.CrossEntropyLoss(), distill=None, teacher=None, seed=0, device=torch.device("cpu")
    )
    optimizer = build_adamw(
        model,
        task,
        FinetuneOptimConfig(
            layer_decay=0.65, weight_decay=0.05, betas=(0.9, 0.999), base_lr=1e-3, global_batch=256
        ),
    )
    images, targets = numbers["images"].float(), numbers["soft_targets"]
    features = model.forward_head(model.forward_features(images[0]), pre_logits=True)
    torch.testing.assert_close(features, numbers[f"{pool}.features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images[0]), numbers[f"{pool}.logits"], rtol=1e-4, atol=1e-5)
    task(images[0], targets[0])["loss"].backward()
    gradients = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    listed = dict(
        zip(schedules[f"{pool}.grad_names"], numbers[f"{pool}.grad_norm_step1"].tolist(), strict=True)
    )
    assert gradients == pytest.approx(listed, rel=1e-3, abs=1e-6)
    optimizer.zero_grad()
    for step in range(3):
        pieces = zip(images[step].chunk(accumulation), targets[step].chunk(accumulation), strict=True)
        losses, norm = take_step(
            task,
            optimizer,
            pieces,
            lr=1e-3,
            accumulation=accumulation,
            clip_grad=0.0,
            accelerator=accelerator,
        )
        assert losses["loss"].item() == pytest.approx(numbers[f"{pool}.loss"][step].item(), rel=1e-4)
        assert norm.item() == pytest.approx(numbers[f"{pool}.grad_norm_global"][step].item(), rel=1e-3)
    after = {
        name.removeprefix("gap.after3."): tensor
        for name, tensor in numbers.items()
        if name.startswith("gap.after3.")
    }
    for name, expected in after.items() if pool == "gap" else ():
        actual = model.state_dict()[name].clone()
        if name.endswith("attn.qkv.bias"):  # the gradient of the third for the keys is rounding noise
            width = len(expected) // 3
            actual[width : 2 * width] = expected[width : 2 * width]
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_clipping_scales_the_gradient_and_reports_its_norm_before(numbers):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True), tiny(numbers, "gap")
    task = build_task(
        model, nn.CrossEntropyLoss(), distill=None, teacher=None, seed=0, device=torch.device("cpu")
    )
    before = model.head.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pieces = [(numbers["images"][0].float(), numbers["soft_targets"][0])]
    _, norm = take_step(
        task, optimizer, pieces, lr=1.0, accumulation=1, clip_grad=1e-3, accelerator=accelerator
    )
    assert norm.item() == pytest.approx(numbers["gap.grad_norm_global"][0].item(), rel=1e-3)
    assert 0 < (model.head.weight - before).norm().item() <= 1e-3


def test_the_linear_probe_begins_with_small_weights():
    """Those of the published main_linprobe.py: normal with deviation 0.01, no bias."""
    model = build_classifier(TINY, classifier_kwargs("cls", 1000, norm_first=True), seed=0, **STATISTICS)
    head = LinearProbe(model, seed=0).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02) and not head.bias.any()  # 48,000 draws


def test_three_steps_of_the_linear_probe(numbers):
    model = build_classifier(TINY, classifier_kwargs("cls", 10, norm_first=True), seed=0, **STATISTICS)
    probe = LinearProbe(model, seed=0)
    probe.head.load_state_dict({name: numbers[f"lp.head_init.{name}"] for name in ("weight", "bias")})
    optimizer = build_lars(
        probe.head, LinearOptimConfig(base_lr=6.4, global_batch=256, momentum=0.9, trust=0.001)
    )
    probe.train()
    assert probe.norm.training and not probe.network.training
    features, labels = numbers["lp.features"], numbers["labels"].long()
    for step in range(3):
        loss = nn.functional.cross_entropy(probe.classify(features[step]), labels[step])
        assert loss.item() == pytest.approx(numbers["lp.loss"][step].item(), rel=1e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(probe.head.weight, numbers["lp.after3.1.weight"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe.head.bias, numbers["lp.after3.1.bias"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe.norm.running_mean, numbers["lp.after3.0.running_mean"])
    torch.testing.assert_close(probe.norm.running_var, numbers["lp.after3.0.running_var"])
    probe.eval()
    torch.testing.assert_close(
        probe.classify(features[0]), numbers["lp.eval_logits_after3"], rtol=1e-4, atol=1e-4
    )
    folded = probe.folded()
    torch.testing.assert_close(
        features[0] @ folded["head.weight"].T + folded["head.bias"],
        numbers["lp.eval_logits_after3"],
        rtol=1e-4,
        atol=1e-4,
    )
