"""Options of `make`, and the plan that journal and manifest keep of them."""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.dense import DenseListing, DenseOptions, check_dense
from data_prep.find import Listing
from dmae_ds.data.shards import ShardError


@dataclass(frozen=True)
class MakeOptions:
    """Options that determine the result, together with SRC."""

    samples_per_shard: int = 1000
    seed: int = 0
    classes: Path | None = None
    labels: Path | None = None
    unlabelled: bool = False
    resize: int | None = None
    quality: int | None = None  # of images that --resize stores; None: 95
    verify: str = "header"  # or full
    json: bool = False
    part: str | None = None  # train or val: the images that are left, or those that are held out; None: all
    only: Path | None = None  # a list of the images to take
    arrays: bool = False  # SRC holds .npy arrays [H, W, C]
    dense: DenseOptions = field(default_factory=DenseOptions)


def check_options(options: MakeOptions, src: Path) -> None:
    """Raise ShardError for options that contradict each other."""
    if options.quality is not None and options.resize is None:
        raise ShardError("--quality requires --resize; add --resize N, or remove --quality")
    if options.arrays and options.resize is not None:
        raise ShardError(
            "--resize does not go with --arrays, whose bytes stay as they are; remove one of them"
        )
    check_dense(options.dense, src=src, classes=options.classes)
    dense = "--masks" if options.dense.masks is not None else "--coco"
    if options.dense and options.labels is not None:
        raise ShardError(f"{dense} does not go with --labels: a set has maps and boxes, or labels")
    if options.dense and options.arrays:
        raise ShardError(f"{dense} does not go with --arrays; remove one of them")


def make_plan(listing: Listing, options: MakeOptions, dense: DenseListing | None) -> dict:
    """Options and listing, as stored in journal and manifest; equal plans give equal sets."""
    plan = {
        "by": "dmae-shards make",
        **({} if options.part is None else {"part": options.part}),
        "samples_per_shard": options.samples_per_shard,
        "seed": options.seed,
        "resize": options.resize,
        "quality": None if options.resize is None else options.quality or 95,
        "verify": options.verify,
        "json": options.json,
        **({"arrays": True} if options.arrays else {}),
        **({} if dense is None else dense.plan()),
        "num_sources": len(listing),
        "listing_sha256": listing.sha256(),
    }
    if options.resize is not None:
        import PIL

        plan["pillow"] = PIL.__version__  # another version may encode other bytes
    return plan
