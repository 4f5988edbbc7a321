"""A step of a distilled segmenter on a fake GPU: nothing waits, copies, reads or mixes devices."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dmae_ds.config.segmentation import LinearHeadConfig, UperNetConfig
from dmae_ds.data.dense import DenseSample
from dmae_ds.dense.backbone import build_backbone
from dmae_ds.dense.segment_task import LogitTeacher, SegmentTask
from dmae_ds.dense.segmenter import Segmenter
from dmae_ds.models.patches import Normalize
from dmae_ds.plan.fake_cuda import fake_device
from tests.dense.test_segmenter import NETWORK
from tests.fake_cuda.networks import on_device
from tests.fake_cuda.watch import Watch

HEADS = {"upernet": UperNetConfig(name="upernet", channels=8), "linear": LinearHeadConfig(name="linear")}


def make_task(head):
    segmenter, larger = (
        Segmenter(build_backbone(NETWORK, seed=seed, drop_path=0.2), head, num_classes=5, seed=seed)
        for seed in (1, 2)
    )
    teacher = LogitTeacher(larger, Normalize((0.5,) * 3, (0.5,) * 3), weight=3.0, temperature=1.0)
    task = SegmentTask(
        segmenter,
        Normalize((0.4,) * 3, (0.5,) * 3),
        auxiliary_weight=0.4,
        teacher=teacher,
        predict=None,
        no_class=255,
        val_images=None,
        processes=None,
    )
    task.train()
    task.teacher.eval()
    return task


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "autocast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["bf16", "fp32"]
)
def test_a_step_neither_waits_nor_copies_nor_reads_nor_mixes_devices(name, autocast):
    task, watch = make_task(HEADS[name]), Watch()
    with fake_device("cuda") as device:
        on_device(task, device)
        trained = [each for each in task.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        pixels = torch.empty(3, 16, 16, dtype=torch.uint8, device=device)
        sample = DenseSample("0", pixels, torch.empty(16, 16, dtype=torch.int64, device=device))
        for _ in range(2):
            watch = Watch()
            with watch.watching():
                context = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
                with context:
                    losses = task([sample, sample])
                losses["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
    assert watch.findings == {} and {value.device.type for value in losses.values()} == {"cuda"}
    assert {"map", "logits"} <= set(losses)
