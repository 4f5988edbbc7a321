"""What the doctor starts on every rank with the real launcher: join the process group, all-reduce as a run would, say how long.

Ends by itself after --limit_s, whatever hangs: the launcher's own way of ending ranks kills by name.
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
    parser.add_argument("--local_rank")  # the launcher's; LOCAL_RANK says the same
    parser.add_argument("--word", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--limit_s", type=float, required=True)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(args.limit_s) + 1)
    world = world_from_env()
    say("started", world)
    device = process_group.start(world, timeout_s=args.limit_s)

    import torch

    values = torch.ones(max(1, args.bytes // 4), device=device)
    collectives.sum_over_ranks(values[:1])  # connections are made now
    say("joined", world)
    times = []
    for _ in range(ROUNDS):
        collectives.barrier()
        start = time.perf_counter()
        total = collectives.sum_over_ranks(values)
        found = total[-1].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
        if found != world.size:
            raise SystemExit(f"the all-reduce of ones over {world.size} ranks gave {found}")
    say("done", world, seconds=min(times), bytes=4 * values.numel(), ranks=world.size, device=device.type)
    process_group.stop()


def say(stage: str, world: World, **more) -> None:
    print(
        f"\n{MARK}{json.dumps({'stage': stage, 'rank': world.rank, 'host': socket.gethostname(), **more})}",
        flush=True,
    )


if __name__ == "__main__":
    main()
