"""RUN/features: what a student made of the pictures, kept, so that k-NN and the probe embed them once between them.

A file's name is a hash of all that its content depends on: the student's weights, the data's fingerprint (and the drawn
subset), the crop, the pool, the precision. Nothing refers to a file but this: delete them whenever you like. Files of
an older student go when a new one's are written, and the oldest go where a bound in GiB asks for it.
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

from dmae_ds.config.run import DataConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.evaluate.features import Processes, extract_features, precision_of
from dmae_ds.models.patches import Normalize
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.units import GIB

VERSION = 1  # of what features are; another one lets no older file in


class FeatureCache:
    """The files of one run and one student.

    gib: the bound on RUN/features; 0 keeps and reads nothing
    """

    def __init__(self, run: Path, student: VisionTransformer, *, gib: float):
        self.folder, self.gib = run / "features", gib
        self.student = fingerprint(student) if gib else None

    def embed(
        self,
        student: VisionTransformer,
        shard_set: ShardSet,
        data: DataConfig,
        *,
        processes: Processes,
        pool: str,
        batch_size: int,
        title: str,
        subset: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`extract_features`, or what it gave before. Collective; a file counts only where every process can read it."""
        made_of = {
            "version": VERSION,
            "student": self.student,
            "data": shard_set.fingerprint,
            "crop_pct": data.crop_pct,
            "mean": data.mean,
            "std": data.std,
            "pool": pool,
            "img_size": student.patch_embed.img_size,
            "precision": precision_of(processes),
        }
        # The whole set's features hold every subset's.
        ways = [(None, made_of)] + (
            []
            if subset is None
            else [(subset, {**made_of, "subset": hashlib.sha256(subset.tobytes()).hexdigest()})]
        )
        for ids, key in ways if self.gib else []:
            found = self._read(key)
            here = torch.tensor([found is not None], device=processes.device)
            if processes.gather(here).all():
                rows = slice(None) if ids is subset else torch.from_numpy(subset)
                return tuple(tensor[rows].to(processes.device) for tensor in found)
        features, labels = extract_features(
            student,
            shard_set,
            accelerator=processes,
            normalize=Normalize(data.mean, data.std).to(processes.device),
            crop_pct=data.crop_pct,
            pool=pool,
            batch_size=batch_size,
            num_workers=data.num_workers,
            title=title,
            subset=subset,
        )
        if self.gib and processes.is_main_process:
            self._write(ways[-1][1], {"features": features.cpu(), "labels": labels.cpu()})
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
            os.utime(path)  # the oldest in use goes last
        except (SafetensorError, OSError) as error:
            print(f"'{path}' can't be used ({error}); the features are extracted again", file=sys.stderr)
            return None
        return tensors["features"], tensors["labels"]

    def _write(self, made_of: dict, tensors: dict[str, Tensor]) -> None:
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        if num_bytes > self.gib * GIB:
            print(
                f"features of {num_bytes / GIB:.1f} GiB are not kept: --cache-gib is {self.gib:g}",
                file=sys.stderr,
            )
            return
        self.folder.mkdir(exist_ok=True)
        self._make_room(num_bytes)
        path = self._path(made_of)
        replace_tensors(path, tensors, {"student": self.student, "made_of": json.dumps(made_of)})

    def _make_room(self, num_bytes: int) -> None:
        """Delete what another student left, then the files that were used longest ago."""
        kept = []
        for path in self.folder.glob("*.safetensors*"):
            if path.suffix == ".tmp" or _student_of(path) != self.student:
                path.unlink(missing_ok=True)  # a killed writer's .tmp, too
            else:
                kept.append(path)
        kept.sort(key=lambda path: path.stat().st_mtime)
        while kept and sum(path.stat().st_size for path in kept) + num_bytes > self.gib * GIB:
            kept.pop(0).unlink(missing_ok=True)


def fingerprint(student: VisionTransformer) -> str:
    """sha256 of the weights by name: of the values that are in memory, whatever a file on the disk became meanwhile."""
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
