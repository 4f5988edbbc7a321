"""CRD and SRRL compared with numbers of their published code, and with slow references in float64."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dmae_ds.config.evaluation import CrdConfig, DistillConfig
from dmae_ds.data.batch import Batch
from dmae_ds.finetune.contrast import Contrast
from dmae_ds.finetune.crd import contrastive_loss, update_rows
from dmae_ds.finetune.tasks import build_task, set_training
from tests.messages import refused

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """The oracles' networks, with the methods of timm's ViTs that the tasks call."""

    num_prefix_tokens = 0

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, images):
        return self.head(self.forward_head(self.forward_features(images), pre_logits=True))


class TinyCrd(Tiny):
    def __init__(self, tensors, img):
        super().__init__()
        self.num_features = tensors["body.bias"].numel()
        self.body = nn.Linear(3 * img * img, self.num_features)
        self.head = nn.Linear(self.num_features, tensors["head.bias"].numel())
        self.load_state_dict(tensors)

    def forward_features(self, images):
        return F.gelu(self.body(images.flatten(1)))

    def forward_head(self, features, pre_logits):
        return features


class TinySrrl(Tiny):
    def __init__(self, tensors):
        super().__init__()
        hidden, _, patch, _ = tensors["stem.weight"].shape
        self.num_features = tensors["out.bias"].numel()
        self.stem = nn.Conv2d(3, hidden, patch, patch, bias=False)
        self.bn, self.out = nn.BatchNorm2d(hidden), nn.Conv2d(hidden, self.num_features, 1)
        self.head = nn.Linear(self.num_features, tensors["fc.bias"].numel())
        renamed = {name.replace("fc.", "head."): tensor for name, tensor in tensors.items()}
        missing, unexpected = self.load_state_dict(renamed, strict=False)
        assert not unexpected and all("num_batches" in name for name in missing)

    def forward_features(self, images):
        return self.out(F.gelu(self.bn(self.stem(images)))).flatten(2).transpose(1, 2)

    def forward_head(self, tokens, pre_logits):
        return tokens.mean(1)


def case_of(oracles, name, case):
    tensors = {
        key.removeprefix(f"{case}."): tensor
        for key, tensor in load_file(oracles / f"{name}.safetensors").items()
        if key.startswith(f"{case}.")
    }
    with safe_open(oracles / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    options, names = (json.loads(metadata[key])[case] for key in ("cases", "names"))
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, options, names


def below(tensors, prefix):
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def make(student, teacher, contrast=None, **distill):
    config = DistillConfig(teacher="file", task_weight=1.0, **distill)
    task = build_task(
        student, nn.CrossEntropyLoss(), distill=config, teacher=teacher, seed=0, device=CPU, contrast=contrast
    )
    set_training(task)
    return task


def assert_steps(task, steps, names, ours, *, lr, weight_decay, step_of):
    """Take the oracle's steps. step_of: number -> (loss, its parts, what follows the optimiser's step)."""
    parameters = dict(task.named_parameters())
    trained = [parameters[ours(name)] for name in names]
    frozen = {id(p) for p in task.teacher.parameters()}
    assert {id(p) for p in trained} == {id(p) for p in task.parameters()} - frozen
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9, weight_decay=weight_decay)
    for number, expected in enumerate(steps):
        optimizer.zero_grad()
        loss, parts, after = step_of(number)
        for name, value in {**parts, "loss": loss}.items():
            assert value.item() == pytest.approx(expected[name].item(), rel=1e-6), name
        loss.backward()
        norms = torch.stack([parameter.grad.norm() for parameter in trained]).double()
        torch.testing.assert_close(norms, expected["grad_norm_float64"], rtol=1e-5, atol=1e-8)
        optimizer.step()
        after(expected)
        norms = torch.stack([parameter.detach().norm() for parameter in trained]).double()
        torch.testing.assert_close(norms, expected["param_norm_after"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["a", "b"])
def test_crd_is_the_published_one(oracles, case):
    tensors, options, names = case_of(oracles, "crd", case)
    student, teacher = (TinyCrd(below(tensors, f"{who}."), options["img"]) for who in ("student", "teacher"))
    num, dim = options["n_data"], options["feat_dim"]
    crd = {"num_negatives": options["nce_k"], "dim": dim, "positives": options["mode"]}
    contrast = Contrast(np.arange(num), np.arange(num) % 2, CrdConfig(**crd), seed=0)
    task = make(student, teacher, contrast, method="crd", weight=options["beta"], crd=crd)
    for ours, theirs in (("embed_student", "embed_s"), ("embed_teacher", "embed_t")):
        getattr(task, ours).load_state_dict(below(tensors, f"{theirs}.linear."))
    for who in ("student", "teacher"):
        getattr(task, f"memory_{who}").copy_(tensors[f"bank_{who}"])
    accelerator = Accelerator()
    steps = [below(tensors, f"step{number}.") for number in range(2)]

    def step_of(number):
        values = steps[number]
        inputs = (
            values["images"],
            values["labels"].long(),
            values["index"].long(),
            values["contrast_index"].long(),
        )
        if number == 0:
            task.normalize([inputs], accelerator=accelerator)
        out = task(*inputs)
        # The published loop has Hinton's term beside it, which is a task of its own here.
        soft = [
            F.log_softmax(logits / options["kd_T"], 1)
            for logits in (out["output"], task.teacher.model(inputs[0]).detach())
        ]
        kd = options["kd_T"] ** 2 * F.kl_div(*soft, reduction="batchmean", log_target=True)
        parts = {
            "ce": out["task_loss"],
            "crd_student_anchor": out["crd_student"],
            "crd_teacher_anchor": out["crd_teacher"],
            "crd": out["crd_student"] + out["crd_teacher"],
            "kd": kd,
        }
        assert options["gamma"] == 1.0
        return out["loss"] + options["alpha"] * kd, parts, lambda expected: check_memory(expected)

    def check_memory(expected):
        task.remember(accelerator=accelerator)
        torch.testing.assert_close(task.normalizers.double(), expected["Z"], rtol=1e-6, atol=0)
        for who in ("student", "teacher"):
            torch.testing.assert_close(
                getattr(task, f"memory_{who}"), expected[f"bank_{who}"], rtol=1e-5, atol=1e-7
            )

    def ours(name):
        for theirs, here in (("embed_s.linear", "embed_student"), ("embed_t.linear", "embed_teacher")):
            name = name.replace(theirs, here)
        return name

    assert_steps(task, steps, names, ours, lr=options["lr"], weight_decay=5e-4, step_of=step_of)
    for name in ("embed_s.linear.weight", "student.body.bias"):
        parameter = dict(task.named_parameters())[ours(name)]
        torch.testing.assert_close(parameter.detach(), tensors[f"after.{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["a", "b"])
def test_srrl_is_the_published_one(oracles, case):
    tensors, options, names = case_of(oracles, "srrl", case)
    student, teacher = (TinySrrl(below(tensors, f"{who}.")) for who in ("student", "teacher"))
    srrl = {"connector": "conv_relu", "logit_weight": options["weight"]}
    task = make(student, teacher.eval(), method="srrl", weight=1.0, srrl=srrl)
    with torch.no_grad():
        task.connect.weight.copy_(tensors["connector.0.weight"].flatten(1))
    task.norm.load_state_dict(below(tensors, "connector.1."), strict=False)
    steps = [below(tensors, f"step{number}.") for number in range(2)]

    def step_of(number):
        out = task(steps[number]["images"], steps[number]["labels"].long())
        parts = {"ce": out["task_loss"], "stat": out["feature_loss"], "logit_mse": out["logit_loss"]}
        return out["loss"], parts, check_norm

    def check_norm(expected):
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(task.norm, name), expected[f"connector_{name}"], rtol=1e-5, atol=1e-6
            )

    def ours(name):
        for theirs, here in (("connector.0", "connect"), ("connector.1", "norm"), ("fc.", "head.")):
            name = name.replace(theirs, here)
        return name

    assert_steps(task, steps, names, ours, lr=options["lr"], weight_decay=1e-4, step_of=step_of)


def test_srrl_as_this_project_reads_it_is_its_formula():
    torch.manual_seed(0)
    numbers = {"stem.weight": torch.randn(6, 3, 4, 4), "bn.weight": torch.ones(6), "bn.bias": torch.zeros(6)}
    numbers |= {"bn.running_mean": torch.zeros(6), "bn.running_var": torch.ones(6)}

    def tiny(width):
        more = {"out.weight": torch.randn(width, 6, 1, 1), "out.bias": torch.randn(width)}
        more |= {"fc.weight": torch.randn(3, width), "fc.bias": torch.randn(3)}
        return TinySrrl({**numbers, **more}).double()

    student, teacher = tiny(4), tiny(5).eval()
    task = make(student, teacher, method="srrl", weight=2.0, srrl={"logit_weight": 3.0}).double()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    out = task(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    features, target = student(images), None
    with torch.no_grad():
        pooled = student.forward_head(student.forward_features(images), pre_logits=True)
        target = teacher.forward_head(teacher.forward_features(images), pre_logits=True)
        weight, feature_loss, logit_loss = task.connect.weight, 0.0, 0.0
        mapped = [[sum((row * image).tolist()) for row in weight] for image in pooled]
        columns = list(zip(*mapped, strict=True))
        for channel, column in enumerate(columns):
            mean = sum(column) / len(column)
            variance = sum((value - mean) ** 2 for value in column) / len(column)
            columns[channel] = [(value - mean) / math.sqrt(variance + 1e-5) for value in column]
        for n in range(6):
            for channel in range(5):
                feature_loss += (columns[channel][n] - target[n, channel]) ** 2 / 30
            for k in range(3):
                logits = [
                    sum(teacher.head.weight[k, c] * each[c] for c in range(5)) + teacher.head.bias[k]
                    for each in ([columns[c][n] for c in range(5)], target[n])
                ]
                logit_loss += (logits[0] - logits[1]) ** 2 / 18
    assert out["feature_loss"].item() == pytest.approx(feature_loss.item(), rel=1e-6)
    assert out["logit_loss"].item() == pytest.approx(logit_loss.item(), rel=1e-6)
    expected = out["task_loss"] + 2 * (feature_loss + 3 * logit_loss)
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert features.shape == (6, 3)


def test_crd_s_loss_and_memory_are_their_formulas():
    rng = np.random.default_rng(0)
    scores, memory = rng.normal(size=(3, 6)), rng.normal(size=(7, 4))
    total, noise = 0.0, 5 / 40
    for row in scores:
        for number, score in enumerate(row):
            p = math.exp(score) / 30.0
            total -= math.log((noise if number else p) / (p + noise + 1e-7)) / 3
    actual = contrastive_loss(torch.tensor(scores), torch.tensor(30.0), num_images=40)
    assert actual.item() == pytest.approx(total, rel=1e-12)
    places, new = [4, 1], rng.normal(size=(2, 4))
    expected = memory.copy()
    for place, row in zip(places, new, strict=True):
        mixed = [0.25 * old + 0.75 * value for old, value in zip(memory[place], row, strict=True)]
        expected[place] = [value / math.sqrt(sum(each**2 for each in mixed)) for value in mixed]
    tensor = torch.tensor(memory)
    update_rows(tensor, torch.tensor(places), torch.tensor(new), momentum=0.25)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-12)


def batch_of(ids, epochs):
    images = torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8)
    return Batch(images, None, None, torch.tensor(ids), torch.tensor(epochs))


@pytest.mark.parametrize("positives", ["exact", "relax"])
@pytest.mark.parametrize("num_negatives", [5, 40], ids=["fewer than images", "more than images"])
def test_negatives_are_of_other_classes_and_keyed_by_seed_epoch_and_sample(positives, num_negatives):
    ids, labels = np.arange(0, 60, 3), np.array([0, 1, 2, 1] * 5)
    config = CrdConfig(positives=positives, num_negatives=num_negatives)
    contrast = Contrast(ids, labels, config, seed=3)
    places, samples = contrast.draw(batch_of([9, 0, 57], [0, 0, 4]))
    assert ids[places].tolist() == [9, 0, 57] and samples.shape == (3, 1 + num_negatives)
    assert (labels[samples[:, 1:]] != labels[places][:, None]).all()
    assert (labels[samples[:, 0]] == labels[places]).all()
    if positives == "exact":
        assert (samples[:, 0] == places).all()
    distinct = [len(set(row[1:].tolist())) for row in samples]
    assert (distinct == [num_negatives] * 3) == (num_negatives == 5)
    alone = contrast.draw(batch_of([57], [4]))[1]  # in any other batch, and after a resume
    assert (alone == samples[2:]).all()
    for other in (
        contrast.draw(batch_of([57], [5]))[1],
        Contrast(ids, labels, config, seed=4).draw(batch_of([57], [4]))[1],
    ):
        assert (other != alone).any()
    counts = np.bincount(np.concatenate([contrast.draw(batch_of([0], [e]))[1][0, 1:] for e in range(300)]))
    expected = 300 * num_negatives / 15
    assert all(count == 0 or abs(count - expected) < 0.25 * expected for count in counts)


def test_relaxed_positives_are_all_of_the_class():
    contrast = Contrast(
        np.arange(12), np.arange(12) % 3, CrdConfig(positives="relax", num_negatives=1), seed=0
    )
    drawn = {int(contrast.draw(batch_of([4], [epoch]))[1][0, 0]) for epoch in range(100)}
    assert drawn == {1, 4, 7, 10}


def test_images_of_one_class_are_refused():
    with refused("distill.method crd", "data.train"):
        Contrast(np.arange(4), np.zeros(4, np.int64), CrdConfig(), seed=0)


def test_a_later_embedding_of_the_same_image_in_a_step_is_the_one_remembered():
    config = CrdConfig(dim=4, num_negatives=2)
    tensors = {"body.weight": torch.randn(4, 3), "body.bias": torch.randn(4)}
    tensors |= {"head.weight": torch.randn(3, 4), "head.bias": torch.randn(3)}
    contrast = Contrast(np.arange(6), np.arange(6) % 2, config, seed=0)
    task = make(TinyCrd(tensors, 1), TinyCrd(tensors, 1), contrast, method="crd", crd=config.model_dump())
    before, first, second = task.memory_student.clone(), torch.randn(2, 4), torch.randn(2, 4)
    task._seen = [(torch.tensor([1, 5]), first, first), (torch.tensor([5, 0]), second, second)]
    task.remember(accelerator=SimpleNamespace(gather=lambda tensor: tensor))
    for place, embedding in ((1, first[0]), (5, second[0]), (0, second[1])):
        expected = F.normalize(0.5 * before[place] + 0.5 * embedding, dim=0)
        torch.testing.assert_close(task.memory_student[place], expected)
    assert torch.equal(task.memory_student[2:5], before[2:5]) and not task._seen
