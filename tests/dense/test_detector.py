"""The detector: canvases, scales, images without a box, odd sizes."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.config.detection import DetectorConfig
from dmae_ds.dense.detector import Canvas, KnownScales, build_detector, build_trunk
from tests.dense.test_trunk import build_vit
from tests.messages import refused

PIXELS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CLASSES, CHANNELS = 3, 16


def build(pyramid="simple", heads="plain", sizes=(32, 32)):
    config = DetectorConfig(pyramid=pyramid, heads=heads, window=2, channels=CHANNELS, proposals=30, rois=16)
    return build_detector(
        build_trunk(build_vit(depth=4), config),
        config,
        num_classes=CLASSES,
        sizes=sizes,
        pixels=PIXELS,
    )


def target(boxes, size):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": torch.arange(len(boxes)) % CLASSES + 1, "masks": masks}


@pytest.mark.parametrize("pyramid, heads", [("simple", "vitdet"), ("fpn", "plain")])
@pytest.mark.parametrize(
    "boxes", [[[[2, 3, 20, 25]], []], [[], []]], ids=["one image without a box", "no image with a box"]
)
def test_images_without_a_box_and_of_odd_sizes_train(pyramid, heads, boxes):
    detector = build(pyramid, heads).train()
    sizes = [(27, 31), (9, 32)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = [target(given, size) for given, size in zip(boxes, sizes, strict=True)]
    assert detector.transform(images)[0].image_sizes == sizes  # training images come in their size
    losses, levels, batch = detector.losses(images, targets)
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    total = sum(losses.values())
    assert total.isfinite() and total > 0
    total.backward()
    missing = [name for name, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert [tuple(level.shape) for level in levels] == [
        (2, CHANNELS, edge, edge) for edge in (32, 16, 8, 4, 2)
    ]
    assert batch.shape == (2, 3, 32, 32)


def test_a_square_canvas_is_the_same_alone_and_in_a_batch():
    detector = build().eval()
    large, small = torch.rand(3, 32, 30), torch.rand(3, 16, 12)
    together, alone = (
        detector.pyramid(detector.transform(images)[0].tensors) for images in ([large, small], [small])
    )
    assert all(
        torch.allclose(one[1], other[0], atol=1e-5) for one, other in zip(together, alone, strict=True)
    )


def test_the_canvas_pads_resizes_and_normalises():
    mean = torch.tensor(PIXELS[0])[:, None, None].expand(3, 8, 20)
    square = Canvas(32, 32, *PIXELS, square=32, size_divisible=16, _skip_resize=True)
    batch, _ = square.train()([mean + 0.1])
    assert batch.tensors.shape == (1, 3, 32, 32) and batch.image_sizes == [(8, 20)]
    torch.testing.assert_close(batch.tensors[0, :, 3, 5], 0.1 / torch.tensor(PIXELS[1]))
    assert not batch.tensors[:, :, 8:].any() and not batch.tensors[:, :, :, 20:].any()
    assert square.eval()([mean])[0].image_sizes == [(12, 32)]  # the longer edge fills the canvas
    board = (torch.arange(96) + torch.arange(96)[:, None]) % 2 * torch.ones(3, 1, 1)
    small = square.eval()([board])[0].tensors * torch.tensor(PIXELS[1])[:, None, None] + mean[:, :1, :1]
    torch.testing.assert_close(small[0, :, 4:28, 4:28], torch.full((3, 24, 24), 0.5), atol=0.05, rtol=0)
    oblong = Canvas(24, 40, *PIXELS, square=None, size_divisible=16, _skip_resize=True)
    batch, _ = oblong.eval()([mean])
    assert batch.image_sizes == [(16, 40)] and batch.tensors.shape[2:] == (16, 48)
    batch, _ = oblong.train()([mean, mean[:, :, :3]])
    assert batch.image_sizes == [(8, 20), (8, 3)] and batch.tensors.shape[2:] == (16, 32)


def test_rois_are_taken_where_they_are_also_if_images_are_smaller_than_the_canvas():
    """A level that holds its own coordinates gives back the centre of a box."""
    strides = [4, 8, 16, 32]
    levels = {}
    for number, stride in enumerate(strides):
        centres = (torch.arange(256 // stride) + 0.5) * stride
        levels[str(number)] = torch.stack(torch.meshgrid(centres, centres, indexing="ij"))[None]
    boxes = [torch.tensor([[8.0, 16.0, 40.0, 64.0], [32.0, 0.0, 250.0, 250.0]])]
    pooled = KnownScales(strides, 7)(levels, boxes, [(70, 60)])
    middle = pooled.mean(dim=(2, 3))
    # torchvision's RoIAlign counts pixels from their centres, half a cell off
    assert (middle[0] - torch.tensor([40.0, 24.0])).abs().max() <= 2.1
    assert (middle[1] - torch.tensor([125.0, 141.0])).abs().max() <= 8.1


def test_anchors_lie_on_the_strides_of_the_maps():
    detector = build(sizes=(40, 72))
    batch, _ = detector.transform([torch.rand(3, 40, 70)])
    levels = list(detector.backbone(batch.tensors).values())
    anchors = detector.rpn.anchor_generator(batch, levels)[0]
    assert batch.tensors.shape[2:] == (48, 80)
    start = 0
    for stride, level in zip((1, 2, 4, 8, 16), levels, strict=True):
        height, width = level.shape[2:]
        assert (height * stride, width * stride) == (48, 80)
        here = anchors[start : start + 3 * height * width]
        centres = (here[:, :2] + here[:, 2:]) / 2
        assert centres[0].tolist() == [0, 0] and centres[-1].tolist() == [80 - stride, 48 - stride]
        start += len(here)
    assert start == len(anchors)


def test_networks_that_do_not_fit_are_refused():
    vit = build_vit(depth=2)
    assert build_trunk(vit, DetectorConfig(pyramid="simple")).taps == (2,)
    assert build_trunk(build_vit(depth=12), DetectorConfig(pyramid="fpn")).taps == (4, 6, 8, 12)
    with refused("detector.pyramid", "fpn", 2, "simple"):
        build_trunk(vit, DetectorConfig(pyramid="fpn"))
    with refused("detector.global_blocks", "block 3", "has 2"):
        build_trunk(vit, DetectorConfig(global_blocks=(1, 3)))
    with refused("network.name", "6 px"):  # strides of 1.5 px would put anchors elsewhere
        build_trunk(build_vit(patch_size=6), DetectorConfig())
