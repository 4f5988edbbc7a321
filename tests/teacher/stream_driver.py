"""Compare streamed teachers with replicated ones on real ranks, bit for bit; test_pipeline.py starts it.

    torchrun stream_driver.py WEIGHTS CASES SCHEDULES

Runs the CASES, and then as many random SCHEDULES, each under a watchdog: lengths, taps, batches, and what
happens between two batches (other collectives, an evaluation, a stop and a resume).
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import time
from pathlib import Path

import torch

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World, world_from_env
from dmae_ds.models.masking import PatchBatch
from dmae_ds.teacher import identity
from dmae_ds.teacher.build import load_frozen_teacher
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.teacher.pipeline import StreamedTeacher, join_group
from dmae_ds.teacher.several import SeveralTeachers
from dmae_ds.teacher.sharded import ShardedTeacher
from dmae_ds.teacher.stages import held_blocks


def batches(rank: int, sizes: list[int]):
    """A rank's own batches of these sizes."""
    for index, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(1000 * rank + index)
        order = torch.rand(size, 16, generator=generator).argsort(dim=1)
        visible, masked = (torch.randn(size, count, 8, 8, 3, generator=generator) for count in (4, 12))
        yield (
            index,
            PatchBatch(visible=visible, masked=masked, ids_keep=order[:, :4], ids_masked=order[:, 4:]),
        )


def load(path: Path, case: dict, device: torch.device, group=None, sharded: bool = False):
    config = TeacherConfig(
        name=case["name"],
        weights=str(path / f"{case['file']}.safetensors"),
        dtype=case["dtype"],
        sees=case["sees"],
        mask_ratio=case.get("mask_ratio"),
        **case["shape"],
    )
    teacher = load_frozen_teacher(
        config,
        taps=tuple(case["taps"]),
        whole_blocks=case["depth"],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        device=device,
        group=group,
        sharded=sharded,
    )
    teacher.spread()
    return teacher


def compare(path: Path, case: dict, world: World, device: torch.device) -> None:
    """Assert that both teachers give the same batches with the same features, to the last bit."""
    replicated = load(path, case, device)
    if case["stages"] is None:
        streamed = load(path, case, device, sharded=True)
        check_shares(streamed, replicated, world)
    else:
        streamed = load(path, case, device, join_group(case["stages"]))
        check_stage(streamed, replicated)
    figures = [identity.fingerprint(teacher.probe().features) for teacher in (replicated, streamed)]
    assert figures[0] == figures[1]
    count = 0
    pairs = zip(
        replicated.stream(batches(world.rank, case["sizes"])),
        streamed.stream(batches(world.rank, case["sizes"])),
        strict=True,
    )
    for (index, batch, expected), (number, same, features) in pairs:
        assert index == number and torch.equal(batch.visible, same.visible)
        assert list(expected) == list(features) == case["taps"]
        for tap in expected:
            assert torch.equal(expected[tap], features[tap]), f"rank {world.rank}, batch {index}"
        count += 1
    assert count == len(case["sizes"])


def compare_several(path: Path, case: dict, world: World, device: torch.device) -> None:
    """Assert that several teachers give each batch with the features of each alone, to the last bit.

    case: {name: case} of teachers, each with its placement
    """
    groups = {
        stages: join_group(stages) for stages in sorted({one["stages"] for one in case.values()} - {None, 0})
    }
    alone = {name: load(path, one, device) for name, one in case.items()}
    chained = SeveralTeachers({name: placed(path, one, device, groups) for name, one in case.items()})
    sizes = next(iter(case.values()))["sizes"]
    count = 0
    for index, batch, features in chained.stream(batches(world.rank, sizes)):
        expected = {
            f"{name}:{tap}": tokens
            for name, teacher in alone.items()
            for tap, tokens in teacher.features(batch).items()
        }
        assert index == count and list(features) == list(expected)
        for tap in expected:
            assert torch.equal(expected[tap], features[tap]), f"{tap}, rank {world.rank}, batch {index}"
        count += 1
    assert count == len(sizes)


def placed(path: Path, case: dict, device: torch.device, groups: dict) -> FrozenTeacher:
    """A teacher in its number of stages: 0 replicated, None sharded over all ranks."""
    return load(path, case, device, groups.get(case["stages"]), sharded=case["stages"] is None)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta)


def check_stage(streamed: StreamedTeacher, replicated: FrozenTeacher) -> None:
    """Assert that a rank holds its stage alone, of the largest stage's size at most."""
    sizes = [bytes_of(block) for block in replicated.vit.blocks]
    stages = held_blocks(len(sizes), streamed.group.num_stages)
    largest = max(sum(sizes[block] for block in stage) for stage in stages)
    assert bytes_of(streamed.vit) <= bytes_of(replicated.vit) - sum(sizes) + largest
    blocks = enumerate(streamed.vit.blocks)
    held = [number for number, block in blocks if not next(block.parameters()).is_meta]
    assert held == list(stages[streamed.group.stage])


def check_shares(sharded: ShardedTeacher, replicated: FrozenTeacher, world: World) -> None:
    """Assert that a rank holds a share of every block, and two buffers in which blocks are whole."""
    assert all(block.is_meta for block in sharded.vit.blocks.parameters())
    first, *others = collectives.gather_objects(sharded._weights.container.bytes_read)
    assert first > max(others) == min(others)  # the blocks are read once
    buffers = set()
    for mine, whole in zip(sharded.blocks, replicated.vit.blocks, strict=True):
        (block,) = mine._block
        entries = sum(parameter.numel() for parameter in whole.parameters())
        assert entries <= world.size * mine.share.numel() < 1.1 * entries
        buffers |= {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        assert not list(mine.parameters())
    assert len(buffers) == min(2, len(sharded.blocks))


STRESS = {
    "name": "vit_tiny_patch16_224",
    "shape": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2},
    "depth": 8,
    "file": "plain",
}


def stress(path: Path, count: int, world: World, device: torch.device) -> None:
    """Run random schedules, the same on every rank.

    A rank that needs more than two minutes for one ends the job with its stack.
    """
    groups = {num_stages: join_group(num_stages) for num_stages in (1, 2, 4)}
    done = 0
    for seed in range(count):
        faulthandler.dump_traceback_later(120, exit=True)
        draw = random.Random(seed)
        deepest = draw.randint(1, 8)
        taps = sorted({deepest, *draw.sample(range(1, deepest + 1), draw.randint(0, min(2, deepest - 1)))})
        case = {
            **STRESS,
            "taps": [f"block/{tap}" for tap in taps],
            "sees": draw.choice(["visible", "all"]),
            "dtype": "fp32",
        }
        group = groups[draw.choice([number for number in groups if number <= deepest])]
        replicated, streamed = load(path, case, device), load(path, case, device, group)
        streamed.overlap = draw.random() < 0.8
        if draw.random() < 0.5:  # a second teacher, in stages of its own
            second = load(path, case, device, groups[draw.choice([n for n in groups if n <= deepest])])
            replicated = SeveralTeachers({"a": replicated, "b": replicated})
            streamed = SeveralTeachers({"a": streamed, "b": second})
        sizes = [4] * draw.randint(0, 12) + [draw.randint(1, 4)]
        uneven = random.Random(1000 * seed + world.rank)  # ranks at different speeds
        start = 0
        while start < len(sizes):
            # The run is stopped here, and resumed.
            stop = draw.choice([len(sizes), draw.randint(start + 1, len(sizes))])
            for index, batch, features in streamed.stream(list(batches(world.rank, sizes))[start:]):
                expected = replicated.features(batch)
                assert index == start
                for tap in expected:
                    assert torch.equal(expected[tap], features[tap]), f"schedule {seed}, batch {index}"
                between(draw.random(), world, replicated, batch)
                time.sleep(uneven.choice([0, 0, 0.003]))
                start += 1
                if start == stop:
                    break
        done += 1
    faulthandler.cancel_dump_traceback_later()
    if world.is_main:
        print(f"SCHEDULES {done}", flush=True)


def between(
    chance: float, world: World, replicated: FrozenTeacher | SeveralTeachers, batch: PatchBatch
) -> None:
    """Do what a training run does between two batches, on every rank."""
    if chance < 0.3:  # the student's gradients
        assert collectives.mean_over_ranks(torch.ones(1000)).sum() == 1000
    elif chance < 0.4:  # a checkpoint
        collectives.gather_objects(world.rank)
        collectives.barrier()
    elif chance < 0.5:  # an evaluation
        collectives.mean_over_ranks(next(iter(replicated.features(batch).values())).mean())


def main() -> None:
    world = world_from_env()
    device = process_group.start(world)
    for number, case in enumerate(json.loads(sys.argv[2])):
        one_of_several = "several" in case
        check = compare_several if one_of_several else compare
        check(Path(sys.argv[1]), case["several"] if one_of_several else case, world, device)
        if world.is_main:
            print(f"EQUAL {number}", flush=True)
    stress(Path(sys.argv[1]), int(sys.argv[3]), world, device)
    process_group.stop()


if __name__ == "__main__":
    main()
