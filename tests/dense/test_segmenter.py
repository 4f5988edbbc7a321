"""Segmenters: UperNet against a reference in float64, any size of image, backbones, norms over ranks."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.segmentation import LinearHeadConfig, UperNetConfig
from dmae_ds.dense import norm
from dmae_ds.dense.backbone import block_maps, build_backbone, map_blocks
from dmae_ds.dense.norm import BatchNormOverRanks
from dmae_ds.dense.segmenter import Segmenter, UperNet
from dmae_ds.finetune.network import fill_trunk
from tests.dense import float64
from tests.messages import refused
from tests.train.conftest import free_port

NETWORK = ModelConfig(
    name="vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2
)
HEAD = UperNetConfig(name="upernet", channels=6, pool_scales=(1, 2, 3), auxiliary_channels=5)
LINEAR = LinearHeadConfig(name="linear")


def make_segmenter(head=HEAD, network=NETWORK, **options):
    return Segmenter(build_backbone(network, seed=1), head, num_classes=4, seed=2, **options)


def randomise(module, seed):
    """Give every tensor other values, running statistics among them."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.4 * noise)


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])
def test_upernet_equals_a_reference_in_float64(grid):
    decoder = UperNet(HEAD, dim=8, depth=12, num_classes=4).double().eval()
    randomise(decoder, seed=3)
    generator = torch.Generator().manual_seed(4)
    maps = [torch.randn(2, 8, *grid, generator=generator, dtype=torch.float64) for _ in range(4)]
    tensors = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    with torch.no_grad():
        logits, auxiliary = decoder.both(maps)
        assert torch.equal(decoder(maps), logits)
    expected, expected_auxiliary = float64.upernet([one.numpy() for one in maps], tensors, HEAD.pool_scales)
    assert logits.shape == (2, 4, 4 * grid[0], 4 * grid[1]) and auxiliary.shape == (2, 4, *grid)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(auxiliary.numpy(), expected_auxiliary, rtol=0, atol=1e-6)


def test_blocks_of_a_pyramid_are_scaled_by_depth():
    assert map_blocks(12) == [4, 6, 8, 12] and map_blocks(24) == [8, 12, 16, 24]
    assert map_blocks(4) == [1, 2, 3, 4] and map_blocks(1) == [1, 1, 1, 1]


def test_maps_are_the_patch_tokens_after_each_block():
    vit = build_backbone(NETWORK, seed=1).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens, seen = vit._pos_embed(vit.patch_embed(images)), []
    for block in vit.blocks:
        tokens = block(vit.norm_pre(tokens) if not seen else tokens)
        seen.append(tokens[:, 1:])
    for one, number in zip(block_maps(vit, images, [2, 1, 2]), (2, 1, 2), strict=True):
        assert torch.equal(one.flatten(2).mT, seen[number - 1])
    (normed,) = block_maps(vit, images, [2], norm=True)
    torch.testing.assert_close(normed.flatten(2).mT, vit.norm(seen[1]))


@pytest.mark.parametrize("head", [HEAD, LINEAR], ids=["upernet", "linear"])
@pytest.mark.parametrize("size", [(16, 16), (9, 21), (3, 2)])
def test_any_size_of_image_gets_a_class_for_every_pixel(head, size):
    segmenter = make_segmenter(head).eval()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = segmenter(images)
        assert logits.shape == (2, 4, *size) and logits.dtype == torch.float32
        # The part of the last patches that is outside of the image is padded with zeros, and cut off.
        padded = nn.functional.pad(images, (0, -size[1] % 4, 0, -size[0] % 4))
        torch.testing.assert_close(segmenter(padded)[..., : size[0], : size[1]], logits)


def test_every_parameter_that_trains_gets_a_gradient():
    """Otherwise DistributedDataParallel stops; of a frozen ViT only the head trains, in training mode."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for head, frozen in ((HEAD, False), (LINEAR, False), (LINEAR, True), (HEAD, True)):
        segmenter = make_segmenter(head, frozen=frozen).train()
        logits, auxiliary = segmenter.logit_maps(images)
        (logits.sum() + (0 if auxiliary is None else auxiliary.sum())).backward()
        without = [name for name, each in segmenter.named_parameters() if each.grad is None]
        assert without == [name for name, _ in segmenter.named_parameters() if frozen and "backbone" in name]
        assert all(each.requires_grad is not frozen for each in segmenter.backbone.parameters())
        assert segmenter.decoder.training and segmenter.backbone.training is not frozen


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    one = make_segmenter().state_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    other = make_segmenter().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)
    third = Segmenter(build_backbone(NETWORK, seed=1), HEAD, num_classes=4, seed=3).state_dict()
    assert not torch.equal(one["decoder.head.classifier.weight"], third["decoder.head.classifier.weight"])


@pytest.mark.parametrize(
    "name, patch",
    [
        ("vit_small_patch14_reg4_dinov2", 14),  # registers
        ("vit_base_patch16_siglip_224", 16),  # no CLS token, an attention pool
        ("vit_small_patch16_dinov3", 16),  # rotary positions
    ],
)
def test_networks_of_other_kinds_are_backbones_with_their_weights(tmp_path, name, patch):
    """The file is of smaller images than the crops."""
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    trained = timm.create_model(name, num_classes=0, img_size=4 * patch, **small)
    save_file(
        {key: each.contiguous() for key, each in trained.state_dict().items()}, tmp_path / "w.safetensors"
    )
    network = ModelConfig(name=name, img_size=5 * patch, **small)
    vit = build_backbone(network, seed=1)
    fill_trunk(vit, tmp_path / "w.safetensors", "auto", network)
    assert torch.equal(vit.blocks[0].mlp.fc1.weight, trained.blocks[0].mlp.fc1.weight)
    segmenter = Segmenter(vit, HEAD, num_classes=4, seed=2).train()
    images = torch.randn(2, 3, 5 * patch, 5 * patch, generator=torch.Generator().manual_seed(0))
    sum(logits.sum() for logits in segmenter.logit_maps(images)).backward()
    assert all(each.grad is not None for each in segmenter.parameters())
    assert segmenter.eval()(images[..., : 3 * patch]).shape == (2, 4, 5 * patch, 3 * patch)


def test_a_function_of_ones_own_is_refused():
    with refused("network.name", "timm.models:vit_tiny_patch16_224", "vit_base_patch16_224"):
        build_backbone(ModelConfig(name="timm.models:vit_tiny_patch16_224"), seed=0)


def _train_norm(rank, world_size, port, maps, weights, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    queue.put((rank, *run_norm(maps.chunk(world_size)[rank].clone(), weights.chunk(world_size)[rank])))
    torch.distributed.destroy_process_group()


def run_norm(maps, weights):
    """Output, gradients of input and parameters, and running statistics of a norm in training."""
    layer = BatchNormOverRanks(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    maps.requires_grad_(True)
    out = layer(maps)
    (out * weights).sum().backward()
    tensors = [out, maps.grad, layer.weight.grad, layer.running_mean, layer.running_var]
    return [tensor.detach().numpy() for tensor in tensors]


def test_a_norm_with_an_equal_rank_is_torch_s_norm(monkeypatch):
    """Both ranks have the same images: equal statistics, but the unbiased variance is of twice as many."""
    monkeypatch.setattr(norm, "world_size", lambda: 2)
    monkeypatch.setattr(norm, "mean_over_ranks_with_gradient", lambda values: values)
    maps = 2 + 3 * torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(1))
    actual = run_norm(maps.clone(), weights)
    monkeypatch.undo()
    expected = run_norm(maps.clone(), weights)
    for one, other in zip(actual[:4], expected[:4], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    biased = (expected[4] - 0.9) * 19 / 20
    np.testing.assert_allclose(actual[4], 0.9 + biased * 40 / 39, rtol=1e-5)


@pytest.mark.slow
def test_a_norm_over_two_ranks_is_the_norm_of_the_whole_batch():
    """A rank's loss is its part of the sum, so the mean over ranks of gradients is half of the sum's."""
    generator = torch.Generator().manual_seed(0)
    maps = 2 + 3 * torch.randn(4, 3, 2, 5, generator=generator)
    weights = torch.randn(4, 3, 2, 5, generator=generator)
    expected = run_norm(maps.clone(), weights)
    context, port = multiprocessing.get_context("spawn"), free_port()
    queue = context.Queue()
    arguments = [(rank, 2, port, maps, weights, queue) for rank in range(2)]
    processes = [context.Process(target=_train_norm, args=each) for each in arguments]
    for process in processes:
        process.start()
    ranks = [each[1:] for each in sorted((queue.get(timeout=120) for _ in processes), key=lambda e: e[0])]
    for process in processes:
        process.join()
    out, of_input, of_weight, mean, var = zip(*ranks, strict=True)
    np.testing.assert_allclose(np.concatenate(out), expected[0], atol=1e-5)
    np.testing.assert_allclose(np.concatenate(of_input), expected[1], atol=1e-5)
    np.testing.assert_allclose(sum(of_weight), expected[2], atol=1e-4)
    for each_mean, each_var in zip(mean, var, strict=True):
        np.testing.assert_allclose(each_mean, expected[3], atol=1e-6)
        np.testing.assert_allclose(each_var, expected[4], rtol=1e-5)
