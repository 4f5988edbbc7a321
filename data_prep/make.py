"""Convert a folder of JPEG and PNG files to a shard folder: `dmae-shards make SRC DST`.

The images are shuffled once, by --seed, so that a shard is a random sample of the set, and cut into shards by
position: the result depends on SRC and the options, not on workers or interruptions. After a kill at any
moment the same command continues. Bytes are unchanged unless --resize is given. The format is in
dmae_ds/data/shards.py. Unusual files:

    any JPEG or PNG that PIL opens        kept as it is: grey, CMYK, progressive, EXIF, bytes after its end
    a PNG named .JPEG, or the reverse     kept, under the extension of its content
    equal base names, odd, long names     kept: a key is a number, and sources.txt has the name
    a link to a file; to a folder         kept; followed, but not into a folder that contains it
    equal bytes: links, copies            kept, counted; --part leaves what is one file in one part
    a side below 16 px; blank             kept, counted (blank: one colour; only --verify full sees it)
    hidden; system folder; another suffix ignored; counted by suffix
    empty, truncated, not JPEG or PNG     skipped (truncated: no end marker; --verify full decodes each image)
    transparent PNG; 16-bit grey PNG      kept, counted; training sees white below, and the upper byte
    more than 67,108,864 pixels, 256 MiB  skipped by header and size alone, as training refuses them
    unreadable, dangling, a pipe, a loop  skipped
    in no class folder, without a label   skipped
    .npy [H, W, C], uint8 or uint16       ignored; with --arrays they alone are the images, of one kind

With --resize N an image is rotated upright as its EXIF data require and shrunk to a short side of N; an image
that needs neither keeps its bytes. It may have up to 178,956,970 pixels then. Skipped files are listed in
skipped.jsonl with their reasons; their numbers stay unused. With --masks and --coco samples get a label map
and annotations, too (dense.py, DENSE.md).
"""

import hashlib
import json
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.convert import Job, Settings, one_kind, work
from data_prep.dense import DenseListing, match_dense
from data_prep.find import Listing, find_images
from data_prep.journal import Journal
from data_prep.plan import MakeOptions, check_options, make_plan
from data_prep.repeats import find_repeats
from data_prep.skip_limit import SkipLimit
from data_prep.target import BucketTarget, LocalTarget, find_finished, find_target
from data_prep.workers import Workers
from dmae_ds.data.shards import (
    JOURNAL,
    MANIFEST,
    SKIPPED,
    SOURCES,
    ShardError,
    list_files,
    write_manifest,
    write_skipped,
)
from dmae_ds.output.durable import replacing, sync_folder

DEFAULT_OPTIONS = MakeOptions()
MAX_SHARDS = 10**6  # the six digits of a shard's name
MODES = {
    "alpha": "images have an alpha channel: what is transparent becomes white",
    "blank": "images are blank: one colour in every pixel, white where they are transparent",
    "tiny": "images are less than 16 px wide or high",
    "grey16": "images have 16-bit grey: scaled to 8 bits, 65535 becomes white",
}
PLAIN_PATH = re.compile(rb"[ !#-\[\]-~]*")  # what JSON leaves as it is


@dataclass
class Sources:
    """The shuffled images, as written to sources.txt."""

    order: array  # numbers of the images in the listing
    samples_per_shard: int
    offsets: array = field(default_factory=lambda: array("Q"))  # byte offset of each shard's first line
    annotation_offsets: array | None = None  # the same of ANNOTATIONS (dense.py)
    sha256: str = ""


def make_shards(
    src: Path,
    dst: Path | str,
    options: MakeOptions = DEFAULT_OPTIONS,
    *,
    staging: Path | None = None,
    num_workers: int = 1,
    max_skip: int = 0,
    overwrite: bool = False,
) -> None:
    """Convert the images of SRC into DST, or continue to. Raises ShardError, and then DST has no manifest.

    dst: a folder, or a URL as a str, whose shards are made in `staging` (target.py)
    """
    check_options(options, src)
    target = find_target(dst, staging)
    dst = target.folder
    _check_folders(src, dst)
    is_new = not dst.exists()
    dst.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            journal = Journal(dst, forget=overwrite)
            stack.callback(journal.close)
            stack.callback(_remove_temporary, dst)
            workers = stack.enter_context(Workers(work, num_workers))  # before the listing fills the memory
            _make(src, target, options, journal, workers, max_skip=max_skip, overwrite=overwrite)
    except OSError as error:
        raise ShardError(
            f"{error.filename or dst} cannot be written: {error.strerror}; solve this, then run the same "
            f"command to continue"
        ) from None
    finally:
        if (is_new or target.url is not None) and not any(dst.iterdir()):
            dst.rmdir()


def _make(
    src: Path,
    target: LocalTarget | BucketTarget,
    options: MakeOptions,
    journal: Journal,
    workers: Workers,
    *,
    max_skip: int,
    overwrite: bool,
) -> None:
    listing, dense = _find(src, options)
    plan = make_plan(listing, options, dense)
    dst = target.folder
    if _is_complete(target, plan, journal, overwrite=overwrite):
        journal.remove()
        target.clear()
        print(f"{target.shown} is already complete; dmae-shards make --overwrite would make it again")
        return
    if journal.plan is None:
        journal.begin(plan)
    num_done = len(journal.done)
    if num_done:
        print(f"continuing: {num_done:,} shards exist already")
    settings = Settings(
        src=os.fsencode(src),
        dst=dst,
        url=target.url,
        classes=listing.classes,
        decode=options.verify == "full",
        resize=options.resize,
        arrays=options.arrays,
        quality=options.quality or 95,
        json=options.json,
        dense=None if dense is None else dense.settings,
    )
    sources = _write_sources(dst, listing, options)
    if dense is not None:
        lines = dense.write_lines(dst, listing, sources.order, options.samples_per_shard)
        sources.annotation_offsets = lines
    skipped = _convert(listing, sources, settings, journal, workers, max_skip=max_skip)
    shards = [journal.done[number]["shard"] for number in sorted(journal.done)]
    modes = sum((Counter(entry.get("modes")) for entry in journal.done.values()), Counter())
    images = one_kind(modes, dst) if options.arrays else "original"
    if options.resize is not None:
        images = f"short side {options.resize}, JPEG quality {settings.quality}"
    sync_folder(dst)
    write_manifest(
        dst,
        classes=listing.classes,
        seed=options.seed,
        shards=shards,
        images=images,
        dense=None if dense is None else dense.settings.info.entry(),
        made=plan | {"num_skipped": len(skipped), "sources_sha256": sources.sha256, "modes": dict(modes)},
    )
    for name in (SOURCES, SKIPPED, MANIFEST):
        target.publish(name)
    journal.remove()
    sync_folder(dst)
    if (repeats := find_repeats(dst, shards)) is not None:
        one, other = (os.fsdecode(listing.path(sources.order[number])) for number in repeats.first)
        same = f"such as {one!r} and {other!r}"
        print(f"{repeats.count:,} images have the bytes of another (links or copies), {same}")
    target.clear()
    for mode, number in sorted(modes.items()):
        print(f"{number:,} {MODES.get(mode, mode)}")
    total = sum(shard.num_samples for shard in shards)
    print(f"{total:,} images in {len(shards):,} shards in {target.shown}; {len(skipped):,} skipped")


def _find(src: Path, options: MakeOptions) -> tuple[Listing, DenseListing | None]:
    """The images that become samples, and their maps and annotations; prints what was found and left out."""
    listing = find_images(
        src,
        classes_file=None if options.dense else options.classes,
        labels_file=options.labels,
        unlabelled=options.unlabelled or bool(options.dense),
        arrays=options.arrays,
    )
    ignored = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(listing.ignored.items()))
    ignored = f"{listing.ignored.total():,} other files or folders ignored" + (
        f" ({ignored})" if ignored else ""
    )
    print(f"{len(listing):,} images in {len(listing.classes):,} classes; {ignored}")
    if options.only is not None:
        listing = listing.only(options.only)
    dense = None
    if options.dense:
        listing, dense = match_dense(
            src, listing, options.dense, classes=options.classes, is_subset=options.only is not None
        )
        print(f"{len(listing):,} of them have {dense.settings.info.describe()}")
    for note in listing.notes:
        print(note)
    if options.part is not None:
        listing = listing.part(options.part, options.seed, src)
        print(f"{len(listing):,} of them are its part '{options.part}'")
    if len(listing) > options.samples_per_shard * MAX_SHARDS:
        raise ShardError(
            f"{len(listing):,} images need more than {MAX_SHARDS:,} shards; raise --samples-per-shard"
        )
    return listing, dense


def _convert(
    listing: Listing,
    sources: Sources,
    settings: Settings,
    journal: Journal,
    workers: Workers,
    *,
    max_skip: int,
) -> list[dict]:
    """Make every shard that is not done. Returns the skipped files, after writing skipped.jsonl."""
    dst, before, done = settings.dst, dict(journal.done), {}
    skipped = list(listing.skipped)
    entries = workers.run(_jobs(listing, sources, settings, before))
    limit = SkipLimit(max_skip)
    limit.check(skipped)
    from tqdm import tqdm  # takes 50 ms, while the workers are busy

    # disable=None: shown only on a terminal
    with tqdm(total=len(listing), unit=" images", disable=None, smoothing=0.05) as progress:
        source_bytes = 0
        for entry in entries:
            if entry["number"] not in before or entry != before[entry["number"]]:
                journal.append(entry)
            done[entry["number"]] = entry
            skipped += entry["skipped"]
            source_bytes += entry["source_bytes"]
            progress.update(entry["shard"].num_samples + len(entry["skipped"]))
            elapsed_s = progress.format_dict["elapsed"] + 1e-9
            progress.set_postfix_str(f"{source_bytes / 1e6 / elapsed_s:,.0f} MB/s")
            limit.check(skipped)
    skipped.sort(key=lambda item: (item["number"] is None, item["number"], item["source"]))
    write_skipped(dst, skipped)
    if len(skipped) > max_skip or not any(entry["shard"].num_samples for entry in done.values()):
        raise _too_many(skipped, len(listing), dst, max_skip=max_skip)
    return skipped


def _too_many(skipped: list[dict], num_images: int, dst: Path, *, max_skip: int) -> ShardError:
    """The error for too many skipped files, with their whole number."""
    remedy = "fix them"
    if sum(item["number"] is not None for item in skipped) < num_images:
        remedy += f", or allow them with --max-skip {len(skipped)} (now {max_skip})"
    return ShardError(
        f"{len(skipped):,} files cannot be used, first {skipped[0]['source']!r} ({skipped[0]['reason']}), "
        f"all in {dst / SKIPPED}; {remedy}, and run the same command to continue"
    )


def _write_sources(dst: Path, listing: Listing, options: MakeOptions) -> Sources:
    """Shuffle the images, and write their names to sources.txt in the order of their numbers."""
    order = array("I" if len(listing) < 2**32 else "Q", range(len(listing)))
    random.Random(options.seed).shuffle(order)
    sources = Sources(order, options.samples_per_shard)
    digest = hashlib.sha256()
    with replacing(dst / SOURCES) as file:
        for first in range(0, len(order), options.samples_per_shard):
            paths = [listing.path(image) for image in order[first : first + options.samples_per_shard]]
            lines = [
                path if PLAIN_PATH.fullmatch(path) else json.dumps(os.fsdecode(path)).encode()[1:-1]
                for path in paths
            ]
            text = b'"' + b'"\n"'.join(lines) + b'"\n'
            sources.offsets.append(file.tell())
            digest.update(text)
            file.write(text)
    sources.sha256 = digest.hexdigest()
    return sources


def _jobs(listing: Listing, sources: Sources, settings: Settings, before: dict[int, dict]) -> Iterator[Job]:
    """Jobs for the workers, one for each shard."""
    for number, offset in enumerate(sources.offsets):
        first = number * sources.samples_per_shard
        labels = array(
            "i", (listing.labels[image] for image in sources.order[first : first + sources.samples_per_shard])
        )
        name, lines = f"shard-{number:06d}.tar", sources.annotation_offsets
        line = None if lines is None else lines[number]
        yield Job(settings, number, name, first, offset, labels, before.get(number), line)


def _is_complete(
    target: LocalTarget | BucketTarget, plan: dict, journal: Journal, *, overwrite: bool
) -> bool:
    """Whether DST holds the set of `plan`; `overwrite` removes an old set.

    Raises ShardError if DST holds another set.
    """
    if not overwrite:
        return find_finished(target, plan, journal.plan)
    # the manifest first, so that a partly removed set does not look finished
    for name in target.names():
        target.remove(name)
    for path in list_files(target.folder):
        if path.name != JOURNAL:
            path.unlink()
    return False


def _check_folders(src: Path, dst: Path) -> None:
    if not src.is_dir():
        raise ShardError(f"SRC '{src}' is not a folder")
    if dst.resolve().is_relative_to(src.resolve()):
        raise ShardError(f"DST '{dst}' is inside SRC '{src}'; choose a folder elsewhere")
    if dst.exists() and not dst.is_dir():
        raise ShardError(f"DST '{dst}' is not a folder")


def _remove_temporary(dst: Path) -> None:
    for path in list_files(dst):
        if path.name.endswith(".tmp"):
            path.unlink()
