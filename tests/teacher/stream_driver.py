"""Streamed against replicated, bit for bit, on real ranks: torchrun stream_driver.py WEIGHTS CASES (test_pipeline.py starts it)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from dmae_ds import dist
from dmae_ds.models.masking import MaskedBatch
from dmae_ds.teacher import identity
from dmae_ds.teacher.formats import open_weights
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, fill, meta_teacher, needed_depths
from dmae_ds.teacher.pipeline import StreamedTeacher, join_group
from dmae_ds.teacher.stages import held_blocks


def batches(rank: int, sizes: list[int]):
    """Every rank's own, of these many pictures each."""
    for index, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        order = torch.rand(size, 16, generator=generator).argsort(dim=1)
        visible, masked = (torch.randn(size, count, 8, 8, 3, generator=generator) for count in (4, 12))
        yield index, MaskedBatch(visible=visible, masked=masked, ids_keep=order[:, :4], ids_masked=order[:, 4:])


def load(path: Path, case: dict, device: torch.device, group=None):
    depth, _ = needed_depths(case["taps"], case["depth"])
    vit, stage = meta_teacher(case["name"], case["shape"], depth), group and held_blocks(depth, group.num_stages)[group.stage]
    parts = fill(
        vit, open_weights(path / f"{case['file']}.safetensors", "timm"), whole_blocks=case["depth"], may_resize=False, dtype=DTYPES[case["dtype"]],
        device=device, blocks=stage,
    )  # fmt: skip
    if group is None:
        return FrozenTeacher(vit, tuple(case["taps"]), parts, sees=case["sees"])
    return StreamedTeacher(vit, tuple(case["taps"]), parts, sees=case["sees"], group=group)


def compare(path: Path, case: dict, world: dist.World, device: torch.device) -> None:
    """Raise AssertionError unless both teachers give the same batches with the same features, to the last bit."""
    replicated, streamed = load(path, case, device), load(path, case, device, join_group(case["stages"]))
    own = [block for block in streamed.vit.blocks if not next(block.parameters()).is_meta]
    assert len(own) == len(held_blocks(streamed.vit.depth, case["stages"])[streamed.group.stage])
    figures = [identity.fingerprint(teacher.probe().features) for teacher in (replicated, streamed)]
    assert figures[0] == figures[1]
    count = 0
    pairs = zip(replicated.stream(batches(world.rank, case["sizes"])), streamed.stream(batches(world.rank, case["sizes"])), strict=True)
    for (index, batch, expected), (number, same, found) in pairs:
        assert index == number and torch.equal(batch.visible, same.visible)
        assert list(expected) == list(found) == case["taps"]
        assert all(torch.equal(expected[tap], found[tap]) for tap in expected), f"rank {world.rank}, batch {index}"
        count += 1
    assert count == len(case["sizes"])


def main() -> None:
    world = dist.world_from_env()
    device = dist.start(world)
    for number, case in enumerate(json.loads(sys.argv[2])):
        compare(Path(sys.argv[1]), case, world, device)
        if world.is_main:
            print(f"EQUAL {number}", flush=True)
    dist.stop()


if __name__ == "__main__":
    main()
