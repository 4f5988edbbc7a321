"""The program that the doctor starts on every rank in place of training.

It joins the process group and times an all-reduce.

It ends by itself after --limit_s, whatever hangs: the launcher's own way to end ranks kills processes by
name.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import time

from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import World, world_from_env
from dmae_ds.doctor.answer import MARK

ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")  # given by the launcher; LOCAL_RANK has the same value
    parser.add_argument("--word", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--limit_s", type=float, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(args.limit_s) + 1)
    world = world_from_env()
    print_stage("started", world)
    device = process_group.start(world, timeout_s=args.limit_s)

    import torch

    values = torch.ones(max(1, args.bytes // 4), device=device)
    collectives.sum_over_ranks(values[:1])  # opens the connections
    print_stage("joined", world)
    times = []
    for _ in range(ROUNDS):
        collectives.barrier()
        start = time.perf_counter()
        total = collectives.sum_over_ranks(values)[-1].item()  # item() waits for a GPU
        times.append(time.perf_counter() - start)
        if total != world.size:
            raise SystemExit(f"the all-reduce of ones over {world.size} ranks gave {total}")
    num_bytes = 4 * values.numel()
    print_stage("done", world, seconds=min(times), bytes=num_bytes, ranks=world.size, device=device.type)
    process_group.stop()


def print_stage(stage: str, world: World, **more) -> None:
    """Print one marked line of JSON, which start.py looks for."""
    line = {"stage": stage, "rank": world.rank, "host": socket.gethostname(), **more}
    print(f"\n{MARK}{json.dumps(line)}", flush=True)


if __name__ == "__main__":
    main()
