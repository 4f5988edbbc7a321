"""`dmae-ds plan`: arguments."""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.cli.arguments import add_recipe
from dmae_ds.errors import UserError

NODE = 8  # GPUs of a node, where more are planned and nothing is said


def add_plan(subcommands) -> None:
    """Add `plan` to the root parser."""
    plan = subcommands.add_parser(
        "plan", help="predict a recipe's memory, traffic and time on GPUs, for every teacher placement"
    )
    add_recipe(plan)
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs, in all (default 8)")
    plan.add_argument(
        "--gpus-per-node", type=int, metavar="N", help=f"GPUs of one node (default: all, at most {NODE})"
    )
    plan.add_argument(
        "--gpu",
        metavar="NAME",
        help="a GPU's data sheet: a100, h100, h200, l40s, ... (dmae_ds/plan/gpus.py); the options below "
        "replace its numbers",
    )
    _add_rates(plan)
    plan.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images of an epoch (default: those of data.train, or ImageNet-1k's 1,281,167)",
    )
    plan.add_argument("--all", action="store_true", help="show all candidates, by placement")
    plan.set_defaults(command=_plan)


def _add_rates(plan: argparse.ArgumentParser) -> None:
    rates = {
        "--efficiency": (
            "SHARE",
            "share of the peak rates that training reaches (default .12, or the GPU's)",
        ),
        "--gpu-memory-gib": ("GIB", "memory of one GPU (default 80)"),
        "--tflops": ("TFLOPS", "peak TFLOP/s of one GPU in bf16 and fp16 (default 300)"),
        "--fp32-tflops": (
            "TFLOPS",
            "peak TFLOP/s of one GPU in fp32 products (default: half of --tflops, as TF32; a 16th with "
            "tf32=false)",
        ),
        "--link-gbps": ("GBPS", "Gbit/s that leave a node (default 400)"),
        "--node-link-gbps": ("GBPS", "Gbit/s of one GPU inside a node (default 2400)"),
        "--worker-images-s": (
            "N",
            "images/s that one core decodes and crops; `dmae-shards bench` measures it (default 500)",
        ),
        "--storage-gb-s": ("GB", "GB/s that a node reads (default 1)"),
    }
    for name, (metavar, text) in rates.items():
        plan.add_argument(name, type=float, metavar=metavar, help=text)
    plan.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="what `dmae-ds bench step RECIPE --json` printed on such a GPU, in place of --efficiency and "
        "the peak rates",
    )


def _plan(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.plan.cost import Machine
    from dmae_ds.plan.gpus import gpu_called
    from dmae_ds.plan.measured import read_measured
    from dmae_ds.plan.table import plan

    config = load_config(args.recipe, args.overrides)
    numbers: dict = {"memory_gib": 80.0}
    if args.gpu is not None:
        gpu = gpu_called(args.gpu)
        gpu.check(config)
        numbers |= gpu.machine()
    measured = None if args.measured is None else read_measured(args.measured)
    if measured is not None:
        for option in ("efficiency", "tflops", "fp32_tflops"):
            if getattr(args, option) is not None:
                name = "--" + option.replace("_", "-")
                raise UserError(f"{name} and --measured give the same number; remove one of them")
        numbers |= measured.machine()
    given = {
        "efficiency": args.efficiency,
        "memory_gib": args.gpu_memory_gib,
        "tflops": args.tflops,
        "fp32_tflops": args.fp32_tflops,
        "link_gbps": args.link_gbps,
        "node_link_gbps": args.node_link_gbps,
        "worker_images_s": args.worker_images_s,
        "storage_gb_s": args.storage_gb_s,
    }
    numbers |= {name: value for name, value in given.items() if value is not None}
    if args.efficiency is not None or measured is not None:
        numbers["band"] = (numbers["efficiency"],)
    per_node = min(args.gpus, NODE) if args.gpus_per_node is None else args.gpus_per_node
    text = plan(
        config,
        Machine(gpus=args.gpus, gpus_per_node=per_node, **numbers),
        recipe=args.recipe,
        overrides=args.overrides,
        images=args.images,
        every_row=args.all,
        measured=measured,
    )
    print(text)
