"""RUN/features: a student's features of the images, kept so that k-NN and the probe embed them only once.

The name of a file is a hash of everything that its content depends on: the student's weights, the data's
fingerprint (and the drawn subset), the crop, the pool, the precision. No other file refers to these, so they
can be deleted at any time. Files of an older student are deleted when new ones are written, and the longest
unused files are deleted to stay within a limit in GiB.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dmae_ds.config.networks import ModelConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.evaluate.features import FeatureOptions, Processes, extract_features, precision_of
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.units import GIB

VERSION = 2  # of the features' definition (2: transparency on white); other files are not read


class FeatureCache:
    """Feature files of one run and one student.

    network: what the student was built from
    gib: the limit of RUN/features; 0: files are neither read nor kept
    """

    def __init__(self, run: Path, student: VisionTransformer, network: ModelConfig, *, gib: float):
        self.folder, self.gib = run / "features", gib
        self.network = [network.name, network.overrides()]
        self.student = fingerprint(student) if gib else None

    def embed(
        self,
        student: VisionTransformer,
        shard_set: ShardSet,
        options: FeatureOptions,
        *,
        processes: Processes,
        title: str,
        subset: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read what `extract_features` returned before, or call it and keep the result. Collective.

        A file is used only where every process can read it.
        """
        made_of = {
            "version": VERSION,
            "student": self.student,
            "network": self.network,
            "data": shard_set.fingerprint,
            "crop_pct": options.crop_pct,
            "mean": options.mean,
            "std": options.std,
            "pool": options.pool,
            "img_size": student.patch_embed.img_size,
            "precision": precision_of(processes),
        }
        if options.bits != 8:
            made_of["bits"] = options.bits
        # The features of the whole set hold those of every subset.
        candidates = [(None, made_of)]
        if subset is not None:
            digest = hashlib.sha256(subset.tobytes()).hexdigest()
            candidates.append((subset, {**made_of, "subset": digest}))
        for ids, key in candidates if self.gib else []:
            stored = self._read(key)
            is_here = torch.tensor([stored is not None], device=processes.device)
            if processes.gather(is_here).all():
                rows = slice(None) if ids is subset else torch.from_numpy(subset)
                return tuple(tensor[rows].to(processes.device) for tensor in stored)
        features, labels = extract_features(
            student, shard_set, options, processes=processes, title=title, subset=subset
        )
        if self.gib and processes.is_main_process:
            self._write(candidates[-1][1], {"features": features.cpu(), "labels": labels.cpu()})
        return features, labels

    def _path(self, made_of: dict) -> Path:
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    def _read(self, made_of: dict) -> tuple[Tensor, Tensor] | None:
        path = self._path(made_of)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
            os.utime(path)  # the longest unused file is deleted first
        except (SafetensorError, OSError) as error:
            print(f"'{path}' cannot be read ({error}); extracting the features again", file=sys.stderr)
            return None
        return tensors["features"], tensors["labels"]

    def _write(self, made_of: dict, tensors: dict[str, Tensor]) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes > self.gib * GIB:
            print(
                f"features of {num_bytes / GIB:.1f} GiB are not kept, because --cache-gib is {self.gib:g}",
                file=sys.stderr,
            )
            return
        self.folder.mkdir(exist_ok=True)
        self._make_room(num_bytes)
        path = self._path(made_of)
        replace_tensors(path, tensors, {"student": self.student, "made_of": json.dumps(made_of)})

    def _make_room(self, num_bytes: int) -> None:
        """Delete the files of other students, then the longest unused ones."""
        kept = []
        for path in self.folder.glob("*.safetensors*"):
            if path.suffix == ".tmp" or _student_of(path) != self.student:
                path.unlink(missing_ok=True)  # or the .tmp of a killed writer
            else:
                kept.append(path)
        kept.sort(key=lambda path: path.stat().st_mtime)
        while kept and sum(path.stat().st_size for path in kept) + num_bytes > self.gib * GIB:
            kept.pop(0).unlink(missing_ok=True)


def fingerprint(student: VisionTransformer) -> str:
    """sha256 of the weights in memory, by name (the file on the disk may have changed since)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _student_of(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("student")
    except (SafetensorError, OSError):
        return None
