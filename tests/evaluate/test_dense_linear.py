"""Linear segmentation compared with torch's own layers, its learning rate, and numbers out of range."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dmae_ds.evaluate import dense_linear
from dmae_ds.evaluate.dense import measure
from dmae_ds.evaluate.dense_linear import LinearHead, LinearOptions, check_linear, learning_rate, train_head
from tests.evaluate.dense_case import MEAN, NO_CLASS, STD, MemorySet, OneProcess, make_network, make_options
from tests.messages import refused


class TwoProcesses(OneProcess):
    """One of two processes; the sums of the other are those of `other`."""

    num_processes = 2

    def __init__(self, rank, other):
        self.process_index, self.other = rank, other

    def reduce(self, tensor):
        return tensor + self.other.pop(0)


def test_the_norm_is_that_of_all_ranks_and_its_running_statistics_torchs():
    features = torch.randn(6, 5, 3, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    reference, head = nn.BatchNorm2d(5), LinearHead(5, 3)
    expected = reference(features)
    parts = [features[::2], features[1::2]]

    def sums(rows):
        rows = rows.double()
        num = torch.tensor([rows.numel() // 5])
        return torch.cat([num, rows.sum(dim=(0, 2, 3)), rows.square().sum(dim=(0, 2, 3))])

    for rank in range(2):
        head = LinearHead(5, 3)
        result = head.normalise(parts[rank], TwoProcesses(rank, [sums(parts[1 - rank])]))
        assert torch.allclose(result, expected[rank::2], atol=1e-5)
        assert torch.allclose(head.norm.running_mean, reference.running_mean, atol=1e-6)
        assert torch.allclose(head.norm.running_var, reference.running_var, atol=1e-5)


def test_a_trained_layer_equals_one_of_torchs_layers_in_a_plain_loop(monkeypatch):
    monkeypatch.setattr(dense_linear, "crop_of", lambda sample, *args, **kwargs: sample)
    network, images = make_network(), MemorySet([(13, 16)] * 8, seed=1, empty=[3])
    linear = LinearOptions(iterations=5, warmup=2, batch=4, dropout=0.0, lr=0.05)
    head = train_head(network, images, make_options(), linear, processes=OneProcess(), title=None)

    reference = nn.Sequential(nn.BatchNorm2d(24), nn.Conv2d(24, 3, 1))
    reference[1].load_state_dict(LinearHead(24, 3).conv.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1, weight_decay=linear.weight_decay)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    for step, rate in enumerate((0.025, 0.05, 0.05, 0.0375, 0.0125)):
        _, numbers = dense_linear.sample_ids(torch.arange(4 * step, 4 * step + 4), num_samples=8, seed=0)
        crops = [images[int(number)] for number in numbers]
        features = network(torch.stack([(crop.image / 255 - mean) / std for crop in crops]))
        scores = functional.interpolate(reference(features), (16, 16), mode="bilinear")[:, :, :13]
        loss = functional.cross_entropy(
            scores, torch.stack([crop.label_map for crop in crops]), ignore_index=NO_CLASS
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for ours, theirs in zip(head.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=2e-4) or theirs.dtype == torch.int64
    rows = network(images_of(1, 3, 8, 8)).flatten(2)[0].T
    expected = reference.eval()(rows[:, :, None, None]).flatten(1)
    assert torch.allclose(head(rows), expected, atol=2e-3)


def images_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def test_the_learning_rate_warms_up_and_ends_at_zero():
    options = LinearOptions(iterations=10, warmup=4, lr=2.0)
    rates = [learning_rate(iteration, options) for iteration in range(11)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[10] == pytest.approx(0)
    assert rates[7] == pytest.approx(1 + math.cos(math.pi / 2))


def test_channels_are_dropped_by_seed_and_iteration_and_scaled():
    options = LinearOptions(batch=50, dropout=0.25)
    factors = dense_linear._dropout(3, options, dim=400)
    assert torch.equal(factors, dense_linear._dropout(3, options, dim=400))
    assert not torch.equal(factors, dense_linear._dropout(4, options, dim=400))
    assert factors.unique().tolist() == pytest.approx([0, 4 / 3])
    assert factors.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [0, 20])
def test_a_crop_and_its_map_agree_and_depend_on_seed_epoch_and_key(size):
    (sample,) = MemorySet([(24, 40)]).samples
    painted = sample._replace(image=torch.full((3, 24, 40), 50, dtype=torch.uint8))
    painted.image[:, 10:18, 6:20] = 250
    painted.label_map[:] = 0
    painted.label_map[10:18, 6:20] = 2
    options, seen = make_options(size=size, window=32), []
    for epoch in range(40):
        crop = dense_linear.crop_of(painted, options, no_class=NO_CLASS, seed=0, epoch=epoch)
        assert crop.image.shape == (3, 32, 32) and crop.label_map.shape == (32, 32)
        is_bright, is_painted = crop.image[0] > 150, crop.label_map == 2
        # Only pixels at the border of the painted patch are in between.
        assert (is_bright != is_painted).sum() <= 0.25 * is_painted.sum() + 2
        assert (crop.image[0][crop.label_map == NO_CLASS] == round(255 * MEAN[0])).all()
        again = dense_linear.crop_of(painted, options, no_class=NO_CLASS, seed=0, epoch=epoch)
        assert torch.equal(again.image, crop.image)
        seen.append(int(is_painted.sum()))
    assert max(seen) > 2 * 8 * 14 > 8 * 14 > min(seen) and len(set(seen)) > 20
    other = dense_linear.crop_of(painted, options, no_class=NO_CLASS, seed=1, epoch=0)
    assert not torch.equal(
        other.image, dense_linear.crop_of(painted, options, no_class=NO_CLASS, seed=0, epoch=0).image
    )


def test_colours_are_learned():
    train, val = MemorySet([(20, 20)] * 6, seed=1), MemorySet([(17, 20), (20, 11)], seed=2)
    linear = LinearOptions(iterations=60, warmup=5, batch=4, lr=0.03)
    options = make_options(window=16, stride=12)
    kwargs = {"processes": OneProcess(), "is_shown": False}
    scores = measure(make_network(), train, val, options, linear, **kwargs)
    few = measure(make_network(), train, val, options, LinearOptions(iterations=1, warmup=0), **kwargs)
    assert scores["miou"] > few["miou"] + 20


def test_numbers_that_train_nothing_are_refused():
    check_linear(LinearOptions(), num_processes=16)
    for wrong, words in (
        ({"batch": 3}, ("--batch 3", "4 ranks")),
        ({"iterations": 0}, ("iterations 0",)),
        ({"iterations": 9, "warmup": 9}, ("warm-up 9",)),
        ({"lr": 0.0}, ("lr 0",)),
        ({"dropout": 1.0}, ("dropout 1",)),
    ):
        with refused(*words):
            check_linear(LinearOptions(**wrong), num_processes=4)
    with refused("not finite", "--lr"):
        linear = LinearOptions(iterations=3, warmup=0, batch=2, lr=1e37)
        images = MemorySet([(12, 12)] * 2)
        train_head(make_network(), images, make_options(), linear, processes=OneProcess(), title=None)
