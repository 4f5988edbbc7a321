"""`dmae-ds teacher cache RECIPE OUT`: the teacher's features of a whole run, stored once.

The same loader, order, crops, masks and stream as in training give the features, on as many ranks as there
are; a rank writes the files of its own part of the global batch (teacher/cache_layout.py). A file appears
when it is complete, so the same command continues after a kill, and the finished files are the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import numpy as np
import torch
from torch import Tensor

from dmae_ds.data.batch import Batch
from dmae_ds.data.storage import Access
from dmae_ds.distributed import collectives, process_group
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.objectives.base import Objective
from dmae_ds.output.durable import replacing, sync_folder
from dmae_ds.output.progress import LINE_EVERY_S, Progress
from dmae_ds.output.units import size_text
from dmae_ds.teacher import identity
from dmae_ds.teacher.build import locate_teacher
from dmae_ds.teacher.cache_codec import (
    VECTORS_A_CHANNEL,
    Codec,
    FitSums,
    build_codecs,
    check_pca,
    fit,
    has_codec,
    needs_fit,
    relative_error,
    write_codec,
)
from dmae_ds.teacher.cache_file import FileWriter, RowReader
from dmae_ds.teacher.cache_layout import CODEC, STORED, Layout, StoredTap
from dmae_ds.teacher.cache_manifest import Manifest, check_same, recipe_identity, weights_identity
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher
from dmae_ds.teacher.stored import describe_stored
from dmae_ds.teacher.targets import stats_path
from dmae_ds.tools.early import CacheRequest, existing_manifest
from dmae_ds.train.checkpoint.run_lock import claim
from dmae_ds.train.device_choices import choose_on_device
from dmae_ds.train.inputs import input_stream
from dmae_ds.train.networks import build_networks
from dmae_ds.train.preflight import Preflight
from dmae_ds.train.step_timer import StepTimer
from dmae_ds.train.stored_inputs import inputs_identity
from dmae_ds.weights.content import identify


def write_cache(preflight: Preflight, request: CacheRequest) -> str:
    """Write the features of a checked recipe, in a process group that is made here; as `store_features`."""
    with process_group.joined(preflight.world, timeout_s=preflight.config.dist.timeout_s) as device:
        return store_features(preflight, request, device)


def store_features(preflight: Preflight, request: CacheRequest, device: torch.device) -> str:
    """Write the features of a checked recipe; returns lines about them on rank 0, "" on others.

    The process group must exist. Raises UserError, and RunFailed where the disk is full.
    """
    preflight, _ = choose_on_device(preflight, device)
    objective, teacher = build_networks(preflight, device, only=request.teacher)
    lock = None
    try:
        lock = claim(request.out, label="OUT")
        return CacheWriter(preflight, request, objective, teacher, device).write()
    except OSError as error:
        raise RunFailed(
            f"'{request.out}' cannot be written: {error.strerror or error}; what is complete stays, and "
            "the same command continues"
        ) from None
    finally:
        if lock is not None:
            lock.close()


class CacheWriter:
    """One rank's part of writing a cache."""

    def __init__(
        self,
        preflight: Preflight,
        request: CacheRequest,
        objective: Objective,
        teacher: FrozenTeacher,
        device: torch.device,
    ):
        self.preflight, self.request = preflight, request
        self.objective, self.teacher, self.device = objective, teacher, device
        self.section = preflight.config.named_teachers()[request.teacher]
        self.access = Access.of(preflight.config.data)

    def write(self) -> str:
        """Write what is missing. Collective."""
        main, out = collectives.is_main(), self.request.out
        collectives.raise_on_all_ranks(lambda: self._begin)  # refuses what can't be stored
        fingerprint = identity.fingerprint(self.teacher.probe().features)  # collective in a pipeline
        manifest = collectives.raise_on_all_ranks(lambda: self._existing(fingerprint) if main else None)
        manifest = collectives.broadcast_from_main(manifest)
        if manifest is None:
            manifest = self._start(fingerprint)
        layout = manifest.layout
        collectives.raise_on_all_ranks(lambda: self._check_room(layout) if main else None)
        self._repair_codec(manifest)
        content = None if manifest.codec_crc32 is None else (out / CODEC).read_bytes()
        codecs = build_codecs(layout.taps, content, self.device)
        missing = collectives.broadcast_from_main(self._missing(layout) if main else None)
        progress = Progress(
            total=layout.num_steps,
            initial=layout.num_steps - sum(map(len, missing)),
            every_s=LINE_EVERY_S,
            is_shown=main,
        )
        with progress:
            for steps in missing:
                self._write_steps(layout, codecs, steps, progress)
        collectives.barrier()
        text = collectives.raise_on_all_ranks(lambda: self._finish(manifest) if main else "")
        collectives.barrier()
        return text

    def _existing(self, fingerprint: dict) -> Manifest | None:
        """The manifest in OUT, if it is one of this recipe; None where OUT is new. Raises UserError."""
        out = self.request.out
        manifest = existing_manifest(out)
        if manifest is None:
            return None
        for name, now in self._begin.items():
            check_same(getattr(manifest, name), now, where=f"OUT '{out}'")
        if manifest.stats not in (None, self._stats()):
            raise UserError(
                f"OUT '{out}' was begun with other teacher.stats; put them back, or take another OUT"
            )
        dtype = DTYPES[self.section.dtype]
        identity.check_fingerprint(fingerprint, manifest.fingerprint, dtype=dtype, where=str(out))
        return manifest

    @property
    def _begin(self) -> dict:
        """The identities that a manifest begins with, as JSON values."""
        config = self.preflight.config
        begin = {
            "recipe": recipe_identity(config, self.section, self.preflight.shards),
            "inputs": inputs_identity(self.objective, config),
            "weights": weights_identity(self.section),
        }
        return json.loads(json.dumps(begin))

    def _stats(self) -> list[int] | None:
        """What identifies the file that the teacher's features are standardised by."""
        if self.section.standardize not in ("zscore", "phi_s"):
            return None
        given = self.section.stats
        return identify(Path(given).expanduser() if given else stats_path(locate_teacher(self.section)))

    def _start(self, fingerprint: dict) -> Manifest:
        """Look at the first features, take means and directions where they are needed, and write a manifest.

        Collective.
        """
        preflight, out, main = self.preflight, self.request.out, collectives.is_main()
        batch, _, features = next(self._stream(range(1)))
        taps = collectives.raise_on_all_ranks(lambda: self._taps(features, len(batch.rows)))
        layout = Layout.of(
            taps,
            global_batch=preflight.config.optim.global_batch,
            lane_rows=preflight.micro_batch,
            num_steps=preflight.num_steps,
        )
        fitted = self._fit(layout, features)
        codec_crc32 = write_codec(out, fitted) if main and fitted else None
        known = {"fingerprint": fingerprint, "codec_crc32": codec_crc32, "stats": self._stats()}
        manifest = Manifest(**self._begin, layout=layout, **known)
        if main:
            manifest.write(out)
        collectives.barrier()
        return collectives.broadcast_from_main(manifest)

    def _repair_codec(self, manifest: Manifest) -> None:
        """Write the codec again where it is missing or damaged. Collective. Raises UserError."""
        main, out, expected = collectives.is_main(), self.request.out, manifest.codec_crc32
        if collectives.broadcast_from_main(has_codec(out, expected) if main else None):
            return
        _, _, features = next(self._stream(range(1)))
        fitted = self._fit(manifest.layout, features)

        def write() -> None:
            if main and write_codec(out, fitted) != expected:
                raise UserError(
                    f"'{out / CODEC}' was damaged or missing, and what is made again differs; copy it back, "
                    "or make another cache"
                )

        collectives.raise_on_all_ranks(write)

    def _taps(self, features: dict[str, Tensor], num_rows: int) -> tuple[StoredTap, ...]:
        request, taps = self.request, []
        for name, tensor in features.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape = (len(tensor) // num_rows, *tensor.shape[1:])
            stored = dtype if request.dtype is None else STORED[request.dtype]
            tap = StoredTap(name, shape, dtype, stored, width=shape[-1])
            check_pca(tap, request.pca)
            taps.append(dataclasses.replace(tap, width=request.pca or shape[-1]))
        return tuple(taps)

    def _fit(self, layout: Layout, features: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Means, directions and scales by tap, from the first steps. Collective."""
        taps = [tap for tap in layout.taps if needs_fit(tap)]
        if not taps:
            return {}
        largest = collectives.gather_objects(
            {tap.name: features[tap.name].abs().max().item() for tap in taps}
        )
        sums = {
            tap.name: FitSums(tap.shape[-1], max(of_rank[tap.name] for of_rank in largest), self.device)
            for tap in taps
        }
        needed = max(
            VECTORS_A_CHANNEL * tap.shape[-1] / (layout.global_batch * tap.num_vectors) for tap in taps
        )
        for _, _, tapped in self._stream(range(min(layout.num_steps, math.ceil(needed)))):
            for name, tap_sums in sums.items():
                tap_sums.add(tapped[name])
        return {tap.name: fit(tap, *sums[tap.name].moments()) for tap in taps}

    def _stream(self, steps: range) -> Iterator[tuple[Batch, object, dict[str, Tensor]]]:
        """This rank's micro-batches of these steps, with features."""
        preflight = dataclasses.replace(self.preflight, num_steps=steps.stop)
        return input_stream(
            preflight,
            self.objective,
            self.teacher,
            start_step=steps.start,
            device=self.device,
            timer=StepTimer(),
        )

    def _missing(self, layout: Layout) -> list[range]:
        """The longest ranges of steps of which a file is not there, or has another size."""
        expected = layout.sizes(layout.first_steps()).items()
        there = {name for name, size in expected if has_size(self.request.out / name, size)}
        missing: list[range] = []
        for first in layout.first_steps():
            if all(layout.file_name(first, lane) in there for lane in range(layout.num_lanes)):
                continue
            stop = min(first + layout.steps_per_file, layout.num_steps)
            if missing and missing[-1].stop == first:
                missing[-1] = range(missing[-1].start, stop)
            else:
                missing.append(range(first, stop))
        return missing

    def _check_room(self, layout: Layout) -> None:
        """Raise UserError where the disk is too small for what is missing."""
        out = self.request.out
        there = sum(file.stat().st_size for file in out.glob("features-*.bin"))
        free, needed = shutil.disk_usage(out).free, layout.total_bytes() - there
        if needed > free:
            raise UserError(
                f"OUT '{out}' needs {size_text(needed)} more and has {size_text(free)} free; give a "
                "narrower --dtype, --pca, fewer --epochs, or another disk"
            )

    def _write_steps(self, layout: Layout, codecs: list[Codec], steps: range, progress: Progress) -> None:
        """Write this rank's files of consecutive steps. Collective where the teacher is."""
        stream, accumulation = self._stream(steps), self.preflight.accumulation
        first_lane = collectives.rank() * accumulation
        for first in range(steps.start, steps.stop, layout.steps_per_file):
            with ExitStack() as files:
                writers: dict[int, FileWriter] = {}
                for lane in range(first_lane, first_lane + accumulation):
                    path = self.request.out / layout.file_name(first, lane)
                    if not has_size(path, layout.file_bytes(first)):
                        writers[lane] = FileWriter(files.enter_context(replacing(path)), layout)
                for _ in range(first, min(first + layout.steps_per_file, steps.stop)):
                    for lane in range(first_lane, first_lane + accumulation):
                        batch, _, features = next(stream)
                        if lane in writers:
                            add_rows(writers[lane], batch, features, codecs)
                    progress.advance()
                for writer in writers.values():
                    writer.finish()
            sync_folder(self.request.out)

    def _finish(self, manifest: Manifest) -> str:
        """Add up the errors of all files and mark the cache as complete; returns lines about it."""
        layout, out = manifest.layout, self.request.out
        reader = RowReader(str(out), layout, access=self.access)
        sums = [
            reader.open(first, lane).sums
            for first in layout.first_steps()
            for lane in range(layout.num_lanes)
        ]
        errors = {
            tap.name: relative_error([math.fsum(values) for values in np.stack(sums)[:, number].T])
            for number, tap in enumerate(layout.taps)
        }
        manifest = manifest.finished(errors)
        manifest.write(out)
        images = layout.num_steps * layout.global_batch
        return "\n".join(
            [
                f"{out}: features of {images:,} images in {layout.num_steps:,} steps, "
                f"{size_text(layout.total_bytes())}, {layout.row_bytes:,} bytes an image",
                *(describe_stored(manifest, tap.name) for tap in layout.taps),
                f"use {self.section.key('placement')}=cache {self.section.key('cache')}={out}",
            ]
        )


def has_size(path: Path, num_bytes: int) -> bool:
    """Whether a file is there and has so many bytes; a copy that was cut short has fewer."""
    return path.is_file() and path.stat().st_size == num_bytes


def add_rows(writer: FileWriter, batch: Batch, features: dict[str, Tensor], codecs: list[Codec]) -> None:
    """Encode a micro-batch's features, measure what is lost, and append them to a file.

    Raises UserError where features do not fit into the dtype.
    """
    raws, sums = [], []
    for codec in codecs:
        exact = features[codec.tap.name]
        raws.append(codec.encode(exact))
        sums.append(codec.error_sums(exact, raws[-1]).numpy())
        if not np.isfinite(sums[-1]).all():
            raise UserError(
                f"features of {codec.tap.name} are not finite in {codec.tap.stored}, whose range is too "
                "narrow, or they are not finite themselves; give --dtype bf16 or fp32"
            )
    writer.add(
        torch.cat(raws, dim=1).cpu().numpy(),
        epochs=batch.epochs.numpy(),
        sample_ids=batch.sample_ids.numpy(),
        sums=np.stack(sums),
    )
