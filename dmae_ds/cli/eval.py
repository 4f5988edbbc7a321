"""`dmae-ds eval KIND`: arguments of the kinds and what they call; torch is imported late."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

from dmae_ds.cli.arguments import add_labels, add_quiet, add_training
from dmae_ds.cli.eval_dense import add_detect, add_segment
from dmae_ds.cli.eval_frozen import add_dense
from dmae_ds.cli.ranks import same_on_every_rank, share_cpus
from dmae_ds.output.parser import in_list


def add_eval(subcommands) -> None:
    """Add `eval` and its subcommands to the root parser."""
    evaluate = subcommands.add_parser("eval", help="measure how good a student is")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")
    _add_knn(kinds)
    _add_probe(kinds)
    add_dense(kinds, _add_sources)
    _add_agreement(kinds)
    _add_classifier(
        kinds,
        "finetune",
        help="train the whole student on labels, then measure its top-1",
        recipe="finetune_mae",
    )
    _add_classifier(
        kinds,
        "linear",
        help="MAE's linear probe: batch norm and one linear layer on the frozen student, trained by LARS",
        recipe="linear_mae",
    )
    add_segment(kinds)
    add_detect(kinds)


def _add_knn(kinds) -> None:
    knn = kinds.add_parser("knn", help="weighted k-nearest-neighbour top-1 and top-5 on frozen features")
    _add_sources(knn)
    knn.add_argument(
        "--k",
        type=in_list(int),
        nargs="+",
        default=[20],
        help="number of neighbours; several numbers take one pass (default 20)",
    )
    knn.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        metavar="T",
        help="temperature of the neighbours' weights exp(cosine / T) (default 0.07)",
    )
    knn.add_argument(
        "--memory-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="memory of the search, without the features; the result is the same (default 1)",
    )
    _add_frozen(knn)
    knn.set_defaults(command=_knn)


def _add_probe(kinds) -> None:
    probe = kinds.add_parser("probe", help="logistic regression on frozen, standardised features, by L-BFGS")
    _add_sources(probe)
    probe.add_argument(
        "--l2",
        type=float,
        help="weight of the L2 penalty (default: the best of a grid on a tenth of the training images)",
    )
    probe.add_argument(
        "--max-iterations", type=int, default=500, metavar="N", help="iterations of L-BFGS (default 500)"
    )
    _add_frozen(probe)
    probe.set_defaults(command=_probe)


def _add_agreement(kinds) -> None:
    agreement = kinds.add_parser(
        "agreement", help="how many neighbours of an image are those that the teacher finds; without labels"
    )
    agreement.add_argument("--k", type=int, default=20, help="number of neighbours (default 20)")
    _add_sources(agreement)
    _add_embedding(agreement)
    agreement.set_defaults(command=_agreement)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    """Add the run folders or weights files, and the overrides behind them."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|FILE",
        help="run folders or weights files, evaluated one after the other; then data.train= and data.val= "
        "for other data, and for a file run.dir= and network.name=",
    )
    parser.set_defaults(overrides=[])  # words behind an option


def _add_frozen(parser: argparse.ArgumentParser) -> None:
    """Add the options of every evaluation on frozen features with labels."""
    add_labels(parser, nargs="+")
    _add_embedding(parser)


def _add_embedding(parser: argparse.ArgumentParser) -> None:
    """Add the options of how images become features."""
    parser.add_argument(
        "--pool",
        choices=("mean", "cls"),
        default="mean",
        help="the feature: mean of the patch tokens, or the CLS token (default mean)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images of one forward pass (default 256)"
    )
    parser.add_argument(
        "--cache-gib",
        type=float,
        default=16.0,
        metavar="GIB",
        help="most that RUN/features may hold; features are kept there (default 16)",
    )
    parser.add_argument(
        "--no-cache", action="store_const", const=0.0, dest="cache_gib", help="neither read nor keep features"
    )
    add_quiet(parser)


def _add_classifier(kinds, name: str, *, help: str, recipe: str) -> None:
    """Add an evaluation that trains a classifier by a recipe."""
    classifier = add_training(
        kinds,
        name,
        help=help,
        recipe=recipe,
        of_file="data.train=, data.val= and run.dir=",
        example="optim.epochs=50",
    )
    add_labels(classifier)
    classifier.set_defaults(command=_classifier, name=name)


def _knn(args: argparse.Namespace) -> None:
    _check_early(args)
    from dmae_ds.evaluate.knn import evaluate_run

    _for_each_run(args, evaluate_run, ks=args.k, temperature=args.temperature, memory_gib=args.memory_gib)


def _probe(args: argparse.Namespace) -> None:
    _check_early(args)
    from dmae_ds.evaluate.probe import evaluate_run

    _for_each_run(args, evaluate_run, l2=args.l2, max_iterations=args.max_iterations)


def _agreement(args: argparse.Namespace) -> None:
    from dmae_ds.evaluate.early import check_weights
    from dmae_ds.evaluate.source import find_sources

    with same_on_every_rank():
        for source in find_sources([*args.runs, *args.overrides]):
            check_weights(source)
    from dmae_ds.evaluate.agreement import evaluate_run

    options = {"k": args.k, "pool": args.pool, "batch_size": args.batch_size, "cache_gib": args.cache_gib}
    with same_on_every_rank() as world:
        share_cpus(world)
        for source in find_sources([*args.runs, *args.overrides]):
            evaluate_run(source, **options)


def _check_early(args: argparse.Namespace) -> None:
    """Raise UserError for what can be known of weights and data without torch."""
    from dmae_ds.evaluate.early import check_source
    from dmae_ds.evaluate.source import find_sources

    with same_on_every_rank():
        sources = find_sources([*args.runs, *args.overrides])
        for source, labels in itertools.product(sources, args.labels):
            check_source(source, labels=labels, subset_seed=_seed_of(args, labels))


def _seed_of(args: argparse.Namespace, labels: str) -> int | None:
    """The seed of a share of the labels; `all` needs none, and refuses one where it is the only share."""
    return args.subset_seed if labels != "all" or len(args.labels) == 1 else None


def _for_each_run(args: argparse.Namespace, evaluate_run: Callable, **options) -> None:
    """Evaluate every run with every share of labels, in one process."""
    from dmae_ds.evaluate.source import find_sources

    options |= {"pool": args.pool, "batch_size": args.batch_size, "cache_gib": args.cache_gib}
    with same_on_every_rank() as world:
        share_cpus(world)
        rows: list[tuple[str, dict]] = []
        sources = find_sources([*args.runs, *args.overrides])
        for source, labels in itertools.product(sources, args.labels):
            name = str(source.run or source.file)
            # A line of its own: progress and warnings go to stderr, and would stand between.
            if len(sources) > 1 and world.is_main and labels == args.labels[0]:
                print(f"{name}:", flush=True)
            results = evaluate_run(source, labels=labels, subset_seed=_seed_of(args, labels), **options)
            # k-NN gives a list, one result for each k; other ranks than the main one have none.
            results = results if isinstance(results, list) else [results]
            rows += [(name, result) for result in results if result is not None]
        if len(rows) > 1 and world.is_main:
            from dmae_ds.evaluate.results import results_table

            print("\n".join(["", *results_table(rows)]))


def _classifier(args: argparse.Namespace) -> None:
    from dmae_ds.finetune.early import check

    given = {
        "recipe": args.recipe,
        "overrides": args.overrides,
        "labels": args.labels,
        "subset_seed": args.subset_seed,
    }
    with same_on_every_rank() as world:
        check(args.name, args.weights, resume=args.resume, world_size=world.size, **given)
    from dmae_ds.finetune.run import evaluate

    with same_on_every_rank() as world:
        share_cpus(world)
        evaluate(args.name, args.weights, resume=args.resume, **given)
