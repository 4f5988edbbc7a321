"""`dmae-ds eval dense`: arguments; torch is imported late."""

from __future__ import annotations

import argparse

from dmae_ds.cli.arguments import add_quiet
from dmae_ds.cli.ranks import same_on_every_rank, share_cpus
from dmae_ds.errors import UserError

# Task -> {option: (type, help)}; the defaults are those of KnnOptions and LinearOptions.
OPTIONS = {
    "knn": {
        "k": (int, "number of neighbours (default 30)"),
        "temperature": (float, "temperature of the neighbours' weights softmax(cosine / T) (default 0.02)"),
        "patches": (
            int,
            "training patches that vote, equally many (1 or more) of each image (default 1024000)",
        ),
        "memory_gib": (float, "memory of the search, without the features; changes no result (default 1)"),
    },
    "linear": {
        "iterations": (int, "optimizer steps (default 40000)"),
        "warmup": (int, "steps of linear warm-up (default 1500)"),
        "batch": (int, "crops of a step, over all ranks (default 16)"),
        "lr": (float, "peak learning rate of AdamW (default 1e-3)"),
        "weight_decay": (float, "weight decay of AdamW (default 1e-3)"),
        "dropout": (float, "share of the channels that are dropped (default 0.1)"),
    },
}
SIZES = {
    "size": "px of an image's short side; 0: as stored (default: the window)",
    "window": "px of a window's side (default: 32 patches, 512 px of 16 px patches)",
    "stride": "px from window to window (default: 2/3 of the window, 341 of 512 px)",
}


def add_dense(kinds, add_sources) -> None:
    """Add `dense` to the kinds of evaluations; add_sources adds the arguments of runs and files."""
    dense = kinds.add_parser("dense", help="mIoU by frozen patch features: dense k-NN, a linear layer")
    add_sources(dense)
    dense.add_argument(
        "--task",
        choices=tuple(OPTIONS),
        nargs="+",
        default=["knn"],
        help="knn: patches vote, nothing is trained; linear: one linear layer is trained (default knn)",
    )
    for task, options in OPTIONS.items():
        group = dense.add_argument_group(f"--task {task}")
        for name, (kind, text) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    for name, text in SIZES.items():
        dense.add_argument(f"--{name}", type=int, metavar="PX", help=text)
    dense.add_argument("--seed", type=int, default=0, help="draws patches and crops (default 0)")
    dense.add_argument("--batch-size", type=int, default=8, metavar="N", help="images of a pass (default 8)")
    add_quiet(dense)
    dense.set_defaults(command=_dense)


def _dense(args: argparse.Namespace) -> None:
    from dmae_ds.evaluate.dense_sets import open_maps
    from dmae_ds.evaluate.early import check_weights
    from dmae_ds.evaluate.source import find_sources

    tasks = list(dict.fromkeys(args.task))
    with same_on_every_rank():
        check_options(args, tasks)
        for source in find_sources([*args.runs, *args.overrides]):
            check_weights(source)
            open_maps(source.data.train, source.data.val, source.data)
    from dmae_ds.evaluate.dense import KnnOptions, evaluate_run
    from dmae_ds.evaluate.dense_linear import LinearOptions

    classes = {"knn": KnnOptions, "linear": LinearOptions}
    chosen = [classes[task](seed=args.seed, **given(args, task)) for task in tasks]
    sizes = {name: getattr(args, name) for name in SIZES}
    with same_on_every_rank() as world:
        share_cpus(world)
        rows: list[tuple[str, dict]] = []
        sources = find_sources([*args.runs, *args.overrides])
        for source in sources:
            name = str(source.run or source.file)
            if len(sources) > 1 and world.is_main:
                print(f"{name}:", flush=True)
            results = evaluate_run(source, tasks=chosen, batch_size=args.batch_size, **sizes)
            rows += [(name, result) for result in results]
        if len(rows) > 1 and world.is_main:
            from dmae_ds.evaluate.results import results_table

            print("\n".join(["", *results_table(rows)]))


def given(args: argparse.Namespace, task: str) -> dict[str, int | float]:
    """The options of a task that were given."""
    values = {name: getattr(args, name) for name in OPTIONS[task]}
    return {name: value for name, value in values.items() if value is not None}


def check_options(args: argparse.Namespace, tasks: list[str]) -> None:
    """Raise UserError for an option of a task that is not measured."""
    for task in OPTIONS:
        ignored = given(args, task)
        if task not in tasks and ignored:
            name = next(iter(ignored)).replace("_", "-")
            raise UserError(
                f"--{name} is of --task {task}, and the tasks are {' '.join(tasks)}; add --task {task}, or "
                f"leave --{name} out"
            )
