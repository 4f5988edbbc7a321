"""`dmae-ds plan`: arguments."""

from __future__ import annotations

import argparse

from dmae_ds.cli.arguments import add_recipe


def add_plan(subcommands) -> None:
    """Add `plan` to the root parser."""
    plan = subcommands.add_parser(
        "plan", help="predict a recipe's memory, traffic and time on GPUs, for every teacher placement"
    )
    add_recipe(plan)
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs, in all (default 8)")
    plan.add_argument(
        "--gpus-per-node", type=int, metavar="N", help="GPUs of one node (default: all of them)"
    )
    plan.add_argument(
        "--gpu-memory-gib", type=float, default=80.0, metavar="GIB", help="memory of one GPU (default 80)"
    )
    plan.add_argument(
        "--tflops",
        type=float,
        default=300.0,
        help="peak TFLOP/s of one GPU in bf16 and fp16 (default 300)",
    )
    plan.add_argument(
        "--fp32-tflops",
        type=float,
        metavar="TFLOPS",
        help="peak TFLOP/s of one GPU in fp32 products (default: half of --tflops, as TF32; a 16th with "
        "tf32=false)",
    )
    plan.add_argument(
        "--link-gbps",
        type=float,
        default=400.0,
        metavar="GBPS",
        help="Gbit/s that leave a node (default 400)",
    )
    plan.add_argument(
        "--node-link-gbps",
        type=float,
        default=2400.0,
        metavar="GBPS",
        help="Gbit/s of one GPU inside a node (default 2400)",
    )
    plan.add_argument(
        "--images",
        type=int,
        metavar="N",
        help="images of an epoch (default: those of data.train, or ImageNet-1k's 1,281,167)",
    )
    plan.add_argument(
        "--worker-images-s",
        type=float,
        default=500.0,
        metavar="N",
        help="images/s that one loader worker decodes and crops; `dmae-shards bench` measures it "
        "(default 500, measured on one core)",
    )
    plan.set_defaults(command=_plan)


def _plan(args: argparse.Namespace) -> None:
    from dmae_ds.config.load import load_config
    from dmae_ds.plan.cost import Machine
    from dmae_ds.plan.table import plan

    machine = Machine(
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node or args.gpus,
        memory_gib=args.gpu_memory_gib,
        tflops=args.tflops,
        fp32_tflops=args.fp32_tflops,
        worker_images_s=args.worker_images_s,
        link_gbps=args.link_gbps,
        node_link_gbps=args.node_link_gbps,
    )
    config = load_config(args.recipe, args.overrides)
    print(plan(config, machine, recipe=args.recipe, overrides=args.overrides, images=args.images))
