"""The EMA teacher follows the engine's weights by its formula and is restored from checkpoints."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dmae_ds.models.vit import build_student
from dmae_ds.objectives.base import Objective, freeze, with_zero_gradient
from dmae_ds.objectives.needs import EmaSpec, Progress
from dmae_ds.train.checkpoint.deepspeed_files import SafeCheckpointEngine
from dmae_ds.train.checkpoint.ema_file import FILE, OLD_FILE, load_ema, save_ema
from dmae_ds.train.ema import EmaTeacher, NoEmaTeacher, build_ema_teacher
from dmae_ds.train.optim import parameter_groups
from tests.messages import refused

CPU = torch.device("cpu")


class Two(Objective):
    """A student and two layers, of which the EMA teacher copies one."""

    def __init__(self, *, every: str = "step"):
        shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
        super().__init__(
            build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(0))
        )
        self.head, self.header = nn.Linear(16, 3), nn.Linear(3, 3)  # one name begins with the other
        self.ema = EmaSpec(
            ("student", "head"), momentum=lambda progress: 0.1 * (1 + progress.step), every=every
        )

    def ema_state(self):
        return {"centre": torch.arange(3.0)}

    def layer_of(self, name):
        if ".blocks." in name:
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith(("student.patch_embed", "student.cls")) else None


def engine_of(objective: Objective) -> SimpleNamespace:
    """An engine that gives the objective's weights as `Engine.full_parameters` does."""

    def full_parameters(parts):
        yield from (
            (name, p.detach()) for name, p in objective.named_parameters() if name.split(".")[0] in parts
        )

    return SimpleNamespace(full_parameters=full_parameters)


def shake(objective: Objective, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def progress_at(step: int, epoch: float = 0.0) -> Progress:
    return Progress(step, 9, epoch, 3.0)


def test_the_ema_teacher_is_the_moving_average_of_its_parts_alone():
    objective = Two()
    ema = EmaTeacher(objective, precision="fp32", device=CPU)
    assert {name.split(".")[0] for name, _ in ema.module.named_parameters()} == {"student", "head"}
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    expected = {
        name: parameter.detach().double().clone() for name, parameter in ema.module.named_parameters()
    }
    for step in range(4):
        shake(objective, step)
        ema.after_step(engine_of(objective), progress_at(step), progress_at(step + 1))
        weights, m = dict(objective.named_parameters()), 0.1 * (1 + step)
        expected = {
            name: m * value + (1 - m) * weights[name].detach().double() for name, value in expected.items()
        }
    for name, parameter in ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_is_a_copy_that_training_does_not_change():
    objective = Two()
    ema = EmaTeacher(objective, precision="fp32", device=CPU)
    before = ema.module.head.weight.clone()
    shake(objective, 0)
    assert torch.equal(ema.module.head.weight, before)
    ema.module.state["centre"].add_(1)
    assert objective.ema_state()["centre"][0] == 0


def test_a_frozen_copy_follows_nothing_and_takes_the_constants_that_a_checkpoint_brings():
    objective = Two(every="never")
    objective.student.register_buffer("kept", torch.zeros(3))
    ema = EmaTeacher(objective, precision="fp32", device=CPU)
    before = [parameter.clone() for parameter in ema.module.parameters()]
    shake(objective, 1)
    for step, epoch in enumerate((0.5, 1.5)):
        ema.after_step(engine_of(objective), progress_at(step, epoch), progress_at(step + 1, epoch + 1))
    assert all(map(torch.equal, ema.module.parameters(), before))
    assert "frozen" in str(ema)
    objective.student.kept.fill_(2)
    assert not ema.module.student.kept.any()
    ema.copy_buffers()
    assert torch.equal(ema.module.student.kept, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    "epochs, updates",
    [((0.0, 0.5, 0.999), 0), ((0.5, 1.0), 1), ((0.9, 1.1, 1.9, 2.0, 2.1), 2), ((1.0, 1.5), 0)],
)
def test_every_epoch_means_after_the_step_that_ends_one(epochs, updates):
    objective = Two(every="epoch")
    ema = EmaTeacher(objective, precision="fp32", device=CPU)
    momenta = []
    ema.update = lambda engine, momentum: momenta.append(momentum)
    for step, (now, following) in enumerate(itertools.pairwise(epochs)):
        ema.after_step(engine_of(objective), progress_at(step, now), progress_at(step + 1, following))
    assert len(momenta) == updates


@pytest.mark.parametrize("name", [FILE, OLD_FILE])
def test_a_saved_ema_teacher_is_restored_bit_for_bit_with_its_state(tmp_path, name):
    """Checkpoints from before December 2026 have OLD_FILE."""
    objective = Two()
    ema, files = EmaTeacher(objective, precision="fp32", device=CPU), SafeCheckpointEngine()
    shake(objective, 1)
    ema.update(engine_of(objective), 0.3)
    ema.module.state["centre"].mul_(3)
    save_ema(ema.tensors(), tmp_path, files)
    assert files.problem is None and files.written[tmp_path / FILE].bytes == (tmp_path / FILE).stat().st_size
    (tmp_path / FILE).rename(tmp_path / name)
    other = EmaTeacher(Two(), precision="fp32", device=CPU)
    load_ema(other.tensors(), tmp_path)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in ema.tensors().items())
    assert other.module.state["centre"].tolist() == [0, 3, 6]


def test_a_missing_or_different_file_is_refused_and_a_disk_error_is_remembered(tmp_path):
    objective = Two()
    ema, files = EmaTeacher(objective, precision="fp32", device=CPU), SafeCheckpointEngine()
    with refused(tmp_path, FILE):
        load_ema(ema.tensors(), tmp_path)
    save_ema(ema.tensors(), tmp_path / "missing", files)
    assert str(tmp_path / "missing" / FILE) in files.problem
    save_ema(ema.tensors(), tmp_path, SafeCheckpointEngine())
    objective.ema = EmaSpec(("student", "head", "header"), momentum=lambda progress: 0.5)
    with refused(tmp_path / FILE, "header"):
        load_ema(EmaTeacher(objective, precision="fp32", device=CPU).tensors(), tmp_path)


def test_an_objective_without_an_ema_teacher_has_one_that_does_nothing(tmp_path):
    objective = Two()
    assert isinstance(build_ema_teacher(objective, precision="fp32", device=CPU), EmaTeacher)
    objective.ema = None
    ema = build_ema_teacher(objective, precision="fp32", device=CPU)
    assert isinstance(ema, NoEmaTeacher) and str(ema) == "" and not list(ema.module.parameters())
    ema.after_step(engine_of(objective), progress_at(0), progress_at(1))
    assert ema.features(SimpleNamespace()) == {}
    files = SafeCheckpointEngine()
    save_ema(ema.tensors(), tmp_path, files)
    load_ema(ema.tensors(), tmp_path)
    assert not files.written and files.problem is None and not list(tmp_path.iterdir())


def test_features_are_made_without_gradients_and_in_the_recipe_s_precision():
    objective = Two()
    objective.ema_features = lambda ema, masked: {
        "ema/head": ema.head(masked.visible),
        "ema/weight": ema.head.weight,
    }
    for precision, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bf16_autocast", torch.bfloat16),
    ):
        found = EmaTeacher(objective, precision=precision, device=CPU).features(
            SimpleNamespace(visible=torch.randn(2, 16))
        )
        assert found["ema/head"].dtype == dtype and not found["ema/head"].requires_grad
        assert found["ema/weight"].dtype == torch.float32
    objective.ema_features = lambda ema, masked: {"head": ema.head(masked.visible)}
    with pytest.raises(AssertionError, match="begin with ema/"):
        EmaTeacher(objective, precision="fp32", device=CPU).features(
            SimpleNamespace(visible=torch.randn(2, 16))
        )


# What else an objective may declare.


def names_of(objective: Objective, groups: list[dict]) -> list[tuple[dict, set[str]]]:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return [
        (
            {key: value for key, value in group.items() if key != "params"},
            {names[id(parameter)] for parameter in group["params"]},
        )
        for group in groups
    ]


def test_learning_rates_decrease_by_layer_and_parameters_without_a_layer_are_on_top():
    objective = Two()
    groups = names_of(objective, parameter_groups(objective, weight_decay=0.05, layer_decay=0.5))
    scale = {name: settings["lr_scale"] for settings, names in groups for name in names}
    assert scale["student.cls_token"] == scale["student.patch_embed.proj.weight"] == 0.25
    assert scale["student.blocks.0.attn.qkv.weight"] == 0.5
    assert scale["student.blocks.1.mlp.fc1.bias"] == scale["head.weight"] == scale["student.norm.bias"] == 1
    decay = {name: settings["weight_decay"] for settings, names in groups for name in names}
    assert decay["head.weight"] == decay["student.cls_token"] == 0.05
    assert decay["head.bias"] == decay["student.norm.weight"] == 0
    assert len(scale) == len(list(objective.parameters()))


def test_scaled_parameters_get_groups_of_their_own_and_nothing_is_lost():
    objective = Two()
    plain = names_of(objective, parameter_groups(objective, weight_decay=0.05, layer_decay=1.0))
    assert len(plain) == 2 and not any(
        "lr_scale" in settings or "scaled_by" in settings for settings, _ in plain
    )
    objective.lr_scales = {"header.": 0.0}
    groups = names_of(objective, parameter_groups(objective, weight_decay=0.05, layer_decay=1.0))
    assert sorted(
        (settings.get("scaled_by") or "", settings["weight_decay"], len(names)) for settings, names in groups
    ) == sorted(
        [
            ("", 0.0, len(plain[0][1]) - 1),
            ("", 0.05, len(plain[1][1]) - 1),
            ("header.", 0.0, 1),
            ("header.", 0.05, 1),
        ]
    )


def test_a_layer_decay_without_layers_is_refused():
    objective = Two()
    objective.layer_of = lambda name: None
    with refused("optim.layer_decay 0.75", "optim.layer_decay=1"):
        parameter_groups(objective, weight_decay=0.05, layer_decay=0.75)


def test_frozen_weights_keep_names_and_values_but_are_no_parameters():
    objective = Two()
    before = objective.state_dict()
    freeze(objective.student.patch_embed)
    after = objective.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not any("patch_embed" in name for name, _ in objective.named_parameters())


def test_a_held_weight_gives_its_values_and_a_gradient_of_zero():
    weight = nn.Parameter(torch.tensor([1.5, -0.1, 3e-8]))
    held = with_zero_gradient(weight)
    assert torch.equal(held, weight)
    held.square().sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3))
