"""`dmae-ds eval ...`: what a student is worth. Parsers and handlers; torch is imported when one of them runs."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from dmae_ds.errors import UserError


def add_eval(commands) -> None:
    """Put `eval` and what is below it into the root parser's subparsers."""
    evaluate = commands.add_parser("eval", help="what a student is worth").add_subparsers(
        required=True, metavar="knn | probe | finetune | linear"
    )

    knn = evaluate.add_parser("knn", help="weighted k-nearest-neighbour top-1 and top-5 on frozen features")
    knn.add_argument("runs", nargs="+", metavar="RUN", help="run folders, one after the other")
    knn.add_argument(
        "--k", type=int, nargs="+", default=[20], help="neighbours; several numbers in one pass (default 20)"
    )
    knn.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        help="of the neighbours' weights exp(cosine / T) (default 0.07)",
    )
    knn.add_argument(
        "--memory-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="for the search, beyond the features; the answer is the same (default 1)",
    )
    _add_frozen(knn)
    knn.set_defaults(command=_eval_knn)

    probe = evaluate.add_parser(
        "probe", help="logistic regression on frozen, standardised features, by L-BFGS"
    )
    probe.add_argument("runs", nargs="+", metavar="RUN", help="run folders, one after the other")
    probe.add_argument(
        "--l2",
        type=float,
        help="weight of the squared weights beside the mean loss (default: the best of a grid on a tenth of train)",
    )
    probe.add_argument("--max-iterations", type=int, default=500, metavar="N", help="of L-BFGS (default 500)")
    _add_frozen(probe)
    probe.set_defaults(command=_eval_probe)

    _add_classifiers(evaluate)


def _add_frozen(parser: argparse.ArgumentParser) -> None:
    """What evaluations on frozen features share."""
    add_labels(parser, nargs="+")
    parser.add_argument(
        "--pool",
        choices=("mean", "cls"),
        default="mean",
        help="feature: mean of the patch tokens, or CLS (default mean)",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--cache-gib",
        type=float,
        default=16.0,
        metavar="GIB",
        help="bound on RUN/features, which keeps features (default 16)",
    )
    parser.add_argument(
        "--no-cache", action="store_const", const=0.0, dest="cache_gib", help="neither read nor keep features"
    )


def _add_classifiers(evaluate) -> None:
    """The evaluations that train a classifier, each by a recipe."""
    for name, about, recipe in (
        (
            "finetune",
            "train all of a student on labels, end to end, and say what it then gets right",
            "finetune_mae",
        ),
        (
            "linear",
            "MAE's linear probe: batch norm and one linear layer on the frozen student, by LARS",
            "linear_mae",
        ),
    ):
        classifier = evaluate.add_parser(name, help=about)
        classifier.add_argument(
            "weights",
            metavar="RUN|FILE",
            help="a run folder; or a weights file, with data.train=, data.val= and run.dir= behind it",
        )
        classifier.add_argument(
            "overrides", nargs="*", metavar="key=value", help="for example optim.epochs=50"
        )
        classifier.add_argument(
            "--recipe",
            default=recipe,
            help=f"a YAML file, or the name of a shipped recipe (default {recipe})",
        )
        classifier.add_argument(
            "--resume",
            choices=("never", "auto"),
            default="never",
            help="auto: continue a killed evaluation where there is one",
        )
        add_labels(classifier)
        classifier.set_defaults(command=_eval_classifier, name=name)


def add_labels(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """`--labels` and `--subset-seed`, the same for every evaluation; `evaluate.subsets.open_subset` takes both."""
    default = "all" if nargs is None else ["all"]
    parser.add_argument(
        "--labels",
        default=default,
        nargs=nargs,
        metavar="SHARE",
        help="labelled training pictures: all, 1%%, 10%%, 5-shot, ... (default all)",
    )
    parser.add_argument(
        "--subset-seed",
        type=int,
        metavar="S",
        help="of the draw (default 0; RUN/subsets keeps the drawn keys)",
    )


def _eval_knn(args: argparse.Namespace) -> None:
    from dmae_ds.evaluate.knn import evaluate_run

    _for_each(args, evaluate_run, ks=args.k, temperature=args.temperature, memory_gib=args.memory_gib)


def _eval_probe(args: argparse.Namespace) -> None:
    from dmae_ds.evaluate.probe import evaluate_run

    _for_each(args, evaluate_run, l2=args.l2, max_iterations=args.max_iterations)


def _for_each(args: argparse.Namespace, evaluate_run: Callable, **options) -> None:
    """Every run with every share of labels: a start for many small evaluations."""
    options |= {name: getattr(args, name) for name in ("pool", "batch_size", "cache_gib")}
    with _on_every_rank():
        for run, labels in itertools.product(args.runs, args.labels):
            # A seed draws few labels; with all of them there is nothing to draw, unless nothing else was asked for.
            seed = args.subset_seed if labels != "all" or len(args.labels) == 1 else None
            if len(args.runs) > 1 and int(os.environ.get("RANK", 0)) == 0:
                print(f"{run}: ", end="", flush=True)
            evaluate_run(Path(run), labels=labels, subset_seed=seed, **options)


@contextmanager
def _on_every_rank() -> Iterator[None]:
    from dmae_ds.distributed.world import world_from_env

    try:
        world_from_env()  # refuses launchers that start fewer processes than asked for
        yield
    except UserError as error:
        error.on_every_rank = True  # so are the run folder and its shards
        raise


def _eval_classifier(args: argparse.Namespace) -> None:
    from dmae_ds.finetune.run import evaluate

    with _on_every_rank():
        evaluate(
            args.name,
            args.weights,
            recipe=args.recipe,
            overrides=args.overrides,
            labels=args.labels,
            subset_seed=args.subset_seed,
            resume=args.resume,
        )
