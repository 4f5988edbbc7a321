"""G2SD's specific stage: its loss in loops in float64, mixed images, and the same network in timm alone."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.models.patches import Normalize
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.classifier import timm_names
from dmae_ds.objectives.initial import fill_student
from dmae_ds.teacher.build import load_frozen_teacher
from dmae_ds.train.optim import build_optimizer
from tests.messages import refused

NAME = "vit_tiny_patch16_224"
TEACHER = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
STUDENT = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
CLASSES = 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZE = Normalize(MEAN, STD)
OFF = {"rand_augment": None, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Write a fine-tuned classifier of the mean of the patch tokens, in timm's names."""
    return write_classifier(tmp_path_factory.mktemp("teacher") / "classifier.safetensors", global_pool="avg")


def write_classifier(path, **keys):
    torch.manual_seed(1)
    model = timm.create_model(NAME, **TEACHER, **{"num_classes": CLASSES, **keys})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    save_file(model.state_dict(), path)
    return path


def recipe(weights, *, teacher=None, student=None, **augment) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "student": {"name": NAME, **STUDENT, **(student or {})},
            "data": {"train": "unused", "mean": MEAN, "std": STD},
            "teacher": {"name": NAME, **TEACHER, "weights": str(weights), **(teacher or {})},
            "objective": {"name": "g2sd_specific", "augment": {**OFF, **augment}},
            "optim": {"global_batch": 256, "base_lr": 1e-2, "epochs": 30},
        }
    )


def build(weights, **changes):
    """Build objective and teacher as a run does, but with heads away from their initial weights near zero."""
    config = recipe(weights, **changes)
    objective, shapes = build_objective(config, num_classes=CLASSES)
    with torch.no_grad():
        for head in (objective.head, objective.head_dist):
            head.weight.copy_(
                torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(2))
                * (1 if head is objective.head else -2)
            )
    return objective, load(config, objective, shapes[""])


def load(config, objective, shape):
    return load_frozen_teacher(
        config.teacher,
        taps=objective.taps,
        whole_blocks=shape.depth,
        mean=MEAN,
        std=STD,
        device=torch.device("cpu"),
        num_classes=CLASSES,
    )


def make_batch(ids, *, epoch=0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.tensor(ids)
    return Batch(images[ids], None, ids % CLASSES, ids, torch.full_like(ids, epoch))


def log_softmax(row):
    top = max(row, key=lambda value: value.detach())
    total = sum(torch.exp(value - top) for value in row)
    return [value - top - torch.log(total) for value in row]


def reference(objective, masked, features):
    """Return the loss in float64.

    Half is the soft cross-entropy of the CLS head, half the cross-entropy of the other head with the
    teacher's arg max.
    """
    objective = objective.double()
    tokens, _ = objective.student(masked.visible.double(), masked.ids_keep, appended=objective.dist_token)
    label = hard = 0.0
    for image in range(len(tokens)):
        ours = [
            tokens[image, 0] @ row + bias
            for row, bias in zip(objective.head.weight, objective.head.bias, strict=True)
        ]
        label = label - sum(
            float(share) * value
            for share, value in zip(masked.targets[image].double(), log_softmax(ours), strict=True)
        )
        teacher = features["logits"][image].tolist()
        decision = max(range(CLASSES), key=lambda number: teacher[number])
        distilled = [
            tokens[image, len(tokens[image]) - 1] @ row + bias
            for row, bias in zip(objective.head_dist.weight, objective.head_dist.bias, strict=True)
        ]
        hard = hard - log_softmax(distilled)[decision]
    return 0.5 * label / len(tokens) + 0.5 * hard / len(tokens)


@pytest.mark.parametrize(
    ("ids", "augment"),
    [
        ([3, 4, 5, 6], {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
        ([7], {"label_smoothing": 0.1}),
        ([1, 2], {}),
        ([1, 2, 3, 4], {"mixup": 0.8, "erase": 1.0}),
    ],
)
def test_the_loss_is_the_formula(classifier, ids, augment):
    objective, teacher = build(classifier, **augment)
    masked = objective.prepare(make_batch(ids), NORMALIZE)
    features = teacher.features(masked)
    with torch.no_grad():
        found = objective(masked, features)
        expected = reference(copy.deepcopy(objective), masked, features)
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(found["loss"]) == pytest.approx((float(found["label"]) + float(found["hard"])) / 2)
    assert 0 <= float(found["follows"]) <= 1


@pytest.mark.parametrize(
    ("teacher", "distilled", "share"),
    [
        ([2, 0, 4, 1], [2, 0, 4, 1], 1.0),
        ([2, 0, 4, 1], [2, 1, 4, 3], 0.5),
        ([2, 0, 4, 1], [0, 1, 0, 1], 0.25),
        ([3], [2], 0.0),
    ],
)
def test_follows_is_the_share_of_the_teacher_s_decisions_by_hand(
    classifier, monkeypatch, teacher, distilled, share
):
    """The label's head decides differently everywhere, and does not count."""
    objective, _ = build(classifier)
    masked = objective.prepare(make_batch(list(range(len(teacher)))), NORMALIZE)
    one_hot = torch.nn.functional.one_hot
    other = (
        one_hot(torch.tensor(teacher) - 1, CLASSES) if 0 not in teacher else one_hot(torch.full((4,), 3), 5)
    )
    monkeypatch.setattr(
        objective, "logits", lambda batch: (other.float(), 2.0 * one_hot(torch.tensor(distilled), CLASSES))
    )
    found = objective(masked, {"logits": 9.0 * one_hot(torch.tensor(teacher), CLASSES)})
    assert float(found["follows"]) == share


def test_three_optimiser_steps_follow_the_formula_s_gradients(classifier):
    config = recipe(classifier, label_smoothing=0.1, mixup=0.8, cutmix=1.0)
    objective, shapes = build_objective(config, num_classes=CLASSES)
    teacher = load(config, objective, shapes[""])
    optimizer = build_optimizer(objective, config.optim.model_copy(update={"layer_decay": 0.75}))
    for step in range(3):
        masked = objective.prepare(make_batch([0, 1, 2, 3], epoch=step), NORMALIZE)
        features = teacher.features(masked)
        ema = copy.deepcopy(objective)
        reference(ema, masked, features).backward()
        optimizer.zero_grad()
        objective(masked, features)["loss"].backward()
        for (name, ours), theirs in zip(objective.named_parameters(), ema.parameters(), strict=True):
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(
                ours.grad.double(),
                theirs.grad,
                rtol=0,
                atol=max(1e-5 * scale, 1e-9),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        optimizer.step()


@pytest.mark.parametrize(
    "keys",
    [{"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}, {"global_pool": "token"}],
    ids=str,
)
def test_a_teacher_s_logits_are_timm_s(tmp_path, keys):
    path = write_classifier(tmp_path / "teacher.safetensors", **keys)
    objective, teacher = build(path, teacher={"pool": "cls" if keys["global_pool"] == "token" else "mean"})
    batch = make_batch([1, 2, 3])
    logits = teacher.features(objective.prepare(batch, NORMALIZE))["logits"]
    model = timm.create_model(NAME, **TEACHER, num_classes=CLASSES, **keys).eval()
    model.load_state_dict({name: tensor for name, tensor in torch_load(path).items()})
    with torch.no_grad():
        expected = model(NORMALIZE(batch.images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def torch_load(path):
    from safetensors.torch import load_file

    return load_file(path)


def test_the_teacher_sees_the_mixed_image(classifier):
    objective, teacher = build(classifier, mixup=0.8)
    plain, _ = build(classifier)
    mixed, whole = (
        objective.prepare(make_batch([0, 1]), NORMALIZE),
        plain.prepare(make_batch([0, 1]), NORMALIZE),
    )
    assert mixed.ids_keep.tolist() == [list(range(16))] * 2 and mixed.ids_masked.shape == (2, 0)
    assert not torch.allclose(teacher.features(mixed)["logits"], teacher.features(whole)["logits"], atol=1e-3)


def images_of(objective, batch):
    return objective.mixed(batch, NORMALIZE)


def test_a_mixed_image_is_a_share_of_each_of_two_images(classifier):
    """The share of the pixels equals the share of the label."""
    objective, _ = build(classifier, mixup=0.8)
    plain = NORMALIZE(make_batch([3, 4]).images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    images, targets = images_of(objective, make_batch([3, 4]))
    share = float(targets[0, 3])
    assert 0 < share < 1
    torch.testing.assert_close(images, share * plain + (1 - share) * plain.flip(0))
    torch.testing.assert_close(
        targets, torch.tensor([[0, 0, 0, share, 1 - share], [0, 0, 0, 1 - share, share]])
    )
    cut, _ = build(classifier, cutmix=1.0)
    for ids in ([3, 4], [8, 9], [13, 14]):
        plain = NORMALIZE(make_batch(ids).images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        images, targets = images_of(cut, make_batch(ids))
        pasted = (images != plain).any(dim=1).float().mean(dim=(1, 2))
        assert torch.equal(
            images, torch.where((images != plain).any(dim=1, keepdim=True), plain.flip(0), plain)
        )
        torch.testing.assert_close(targets[:, 3:].diagonal(), 1 - pasted, rtol=0, atol=1e-6)


def test_smoothing_is_deit_s(classifier):
    objective, _ = build(classifier, label_smoothing=0.1)
    _, targets = images_of(objective, make_batch([3]))
    torch.testing.assert_close(targets, torch.tensor([[0.02, 0.02, 0.02, 0.92, 0.02]]))


def test_mixes_do_not_depend_on_how_the_batch_is_cut(classifier):
    objective, _ = build(classifier, mixup=0.8, cutmix=1.0, erase=0.5, label_smoothing=0.1)
    ids = list(range(12))
    images, targets = images_of(objective, make_batch(ids))
    torch.manual_seed(99)
    parts = [
        images_of(objective, make_batch(ids[first:last])) for first, last in ((8, 12), (2, 4), (0, 2), (4, 8))
    ]
    order = [8, 9, 10, 11, 2, 3, 0, 1, 4, 5, 6, 7]
    assert torch.equal(torch.cat([part[0] for part in parts]), images[order]) and torch.equal(
        torch.cat([part[1] for part in parts]), targets[order]
    )
    again, _ = images_of(objective, make_batch(ids, epoch=1))
    assert not torch.equal(again, images)
    assert len({round(float(row.max()), 6) for row in targets}) > 3  # one draw a pair
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(12), rtol=0, atol=1e-6)


def test_timm_alone_gives_the_mean_of_the_two_heads(classifier):
    objective, _ = build(classifier)
    objective = objective.double()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
            )
    batch = make_batch([1, 2, 3])
    masked = objective.prepare(batch, NORMALIZE)
    masked.visible = masked.visible.double()
    found = objective.classifier()
    model = found.build().double().eval()
    model.load_state_dict(found.tensors(objective.state_dict()), strict=True)
    with torch.no_grad():
        ours = sum(objective.logits(masked)) / 2
        theirs = model(NORMALIZE(batch.images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).double())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    assert timm_names(objective.state_dict())["pos_embed"].shape == (1, 18, 8)
    assert json.loads(json.dumps(found.numbers)) == {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4.0,
    }


def test_initial_weights_come_from_an_earlier_run(classifier, tmp_path):
    first, _ = build_objective(recipe(classifier, student={"depth": 2}), num_classes=CLASSES)
    with torch.no_grad():
        for parameter in first.student.parameters():
            parameter.add_(1.0)
    overrides = {"timm_name": NAME, "timm_overrides": json.dumps(STUDENT)}
    save_file(first.student.state_dict(), tmp_path / "student.safetensors", metadata=overrides)
    begun = begin(recipe(classifier, student={"weights": str(tmp_path)}))
    for name, tensor in first.student.state_dict().items():
        assert torch.equal(tensor, begun.student.state_dict()[name])
    with refused(tmp_path, "student.name"):
        begin(recipe(classifier, student={"weights": str(tmp_path), "embed_dim": 16}))
    with refused(tmp_path, "vit_tiny_patch16_224", "'num_heads': 2", "'num_heads': 4"):
        begin(recipe(classifier, student={"weights": str(tmp_path), "num_heads": 4}))
    with refused("student.weights", "nowhere"):
        begin(recipe(classifier, student={"weights": "nowhere"}))


def begin(config: RunConfig):
    objective, _ = build_objective(config, num_classes=CLASSES)
    fill_student(objective.student, config.student.weights, config.student)
    return objective


def test_a_teacher_that_gives_no_decisions_is_refused(classifier, tmp_path):
    encoder = {name: tensor for name, tensor in torch_load(classifier).items() if not name.startswith("head")}
    save_file(encoder, tmp_path / "encoder.safetensors")
    seven = write_classifier(tmp_path / "seven.safetensors", global_pool="avg", num_classes=7)
    with refused(tmp_path / "encoder.safetensors", "logits", "classifier"):
        build(tmp_path / "encoder.safetensors")
    with refused("fc_norm", "teacher.pool=mean"):
        build(classifier, teacher={"pool": "cls"})
    with refused(7, "data.train", 5):
        build(seven)
    with refused("teacher.decoder_depth", "objective.name"):
        build_objective(recipe(classifier, teacher={"decoder_depth": 4}), num_classes=CLASSES)
    with refused("teacher.standardize", "layer_norm", "logits", "none"):
        build_objective(recipe(classifier, teacher={"standardize": "layer_norm"}), num_classes=CLASSES)
