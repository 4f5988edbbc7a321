"""What is exported: a run's student, alone or with its pixel decoder, or a classifier made of it, and what it answers.

The answers are those of the network that was trained (`models/vit.py` and the objective, or the classifier of
`eval finetune` and `linear`), not of a copy in another library; an export has to give the same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.models.masking import keep_random
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.build import build_objective

NUM_INPUTS = 3
CLASSIFIER_FILE = "last.safetensors"  # the epoch whose number stands in results.jsonl


@dataclass(frozen=True)
class Inputs:
    """What an export is tried on. pixels [N, 3, H, W] float32, as normalised pictures are; noise [N, L] of the masks."""

    pixels: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Pixels:
    """What is done to a picture before the network sees it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


@dataclass(frozen=True)
class Source:
    """model, in eval mode on the CPU, float32: `encoder` a MaskedViT, `mae` the objective, `classifier` a timm network; vit is its encoder.

    run: the training run, None for a classifier of somebody else's weights; results: the folder whose results.jsonl counts
    name, overrides, keys: what timm is told to build the network, keys being those of a head
    tensors: the weights, the encoder's in timm's names; step: of the student; evaluation, classes: of a classifier, where they are known
    """

    what: str
    run: Path | None
    results: Path
    config: RunConfig | None
    name: str
    overrides: dict
    keys: dict
    pixels: Pixels
    model: nn.Module
    vit: nn.Module
    patch_size: int
    grid: tuple[int, int]
    tensors: dict[str, Tensor]
    step: int
    evaluation: dict | None = None
    classes: list[str] | None = None

    @property
    def img_size(self) -> int:
        return self.grid[0] * self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def inputs(self, seed: int = 0) -> Inputs:
        """Random ones, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(NUM_INPUTS, 3, self.img_size, self.img_size, generator=generator)
        return Inputs(pixels, torch.rand(NUM_INPUTS, self.num_patches, generator=generator))

    @torch.no_grad()
    def answers(self, inputs: Inputs) -> dict[str, Tensor]:
        """encoder: `tokens` [N, 1 + L, D] after the final norm; classifier: `logits` [N, classes];
        mae: `pixels` [N, L - K, P * P * 3] reconstructed in the order of the noise, and `loss`."""
        if self.what == "classifier":
            return {"logits": self.model(inputs.pixels)}
        if self.what == "encoder":
            everything = torch.arange(self.num_patches).expand(len(inputs.pixels), -1)
            return {"tokens": self.vit(patchify(inputs.pixels, self.patch_size), everything)[0]}
        batch = self.model.prepare(Batch(inputs.pixels, inputs.noise), nn.Identity())
        latent, _ = self.vit(batch.visible, batch.ids_keep)
        reconstructed = self.model.decoder(latent, batch.ids_keep, batch.ids_masked)
        return {"pixels": reconstructed.flatten(2), "loss": self.model.pixel_loss(latent, batch)}

    def rounding(self, inputs: Inputs) -> dict[str, float]:
        """How far the network's own float32 answers are from its float64 ones: no other library can be held to less."""
        single = self.answers(inputs)
        self.model.double()
        double = self.answers(Inputs(inputs.pixels.double(), inputs.noise))
        self.model.float()
        return {name: float((single[name].double() - double[name]).abs().max()) for name in single}

    def ids_masked(self, noise: Tensor) -> Tensor:
        """[N, L - K]: the patches that a mask of this noise hides, in the order of `pixels`."""
        return keep_random(noise, self.model.num_visible)[1]


def open_source(folder: Path, what: str) -> Source:
    """Read a run folder (encoder, mae) or the folder of an evaluation (classifier); every tensor must fit. Raises UserError."""
    return _open_classifier(folder) if what == "classifier" else _open_student(folder, what)


def _open_student(run: Path, what: str) -> Source:
    config = read_saved_config(run)
    tensors, metadata = _read(
        run / "student.safetensors",
        "a run writes it with its first checkpoint: wait for one, or set checkpoint.every_steps lower",
    )
    if what == "encoder":
        model: nn.Module = build_student(
            config.student.name, config.student.overrides(), generator=torch.Generator().manual_seed(0)
        )
        weights, vit = tensors, model
    else:
        rest, rest_metadata = _read(run / "decoder.safetensors", "a run writes it with its first checkpoint")
        if rest_metadata.get("step") != metadata.get("step"):
            raise UserError(
                f"student.safetensors is of step {metadata.get('step')}, decoder.safetensors of {rest_metadata.get('step')}: the run is saving; try again"
            )
        model, _ = build_objective(config)
        if not model.reconstructs_pixels:
            raise UserError(
                f"objective {config.objective.name} trains no pixel decoder; export --what encoder"
            )
        weights, vit = (
            {**{f"student.{name}": tensor for name, tensor in tensors.items()}, **rest},
            model.student,
        )
        tensors = {
            **tensors,
            **{name: tensor for name, tensor in rest.items() if name.startswith("decoder.")},
        }
    _fill(model, weights, run)
    return Source(
        what=what,
        run=run,
        results=run,
        config=config,
        name=config.student.name,
        overrides=config.student.overrides(),
        keys={"num_classes": 0},
        pixels=Pixels(config.data.mean, config.data.std, config.data.crop_pct),
        model=model.float().eval(),
        vit=vit,
        patch_size=vit.patch_size,
        grid=vit.grid,
        tensors=_plain(tensors),
        step=int(metadata.get("step", 0)),
    )


def _open_classifier(folder: Path) -> Source:
    path = folder / CLASSIFIER_FILE
    tensors, metadata = _read(
        path, f"name the folder that `dmae-ds eval finetune` or `linear` wrote{_evaluations(folder)}"
    )
    evaluation = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    about = json.loads(metadata["classifier"])
    name, overrides, keys = metadata["timm_name"], json.loads(metadata["timm_overrides"]), about["keys"]
    model = timm.create_model(name, **overrides, **keys)
    _fill(model, tensors, folder)
    run = (
        folder.parent
        if (folder.parent / "config.yaml").is_file() and (folder.parent / "student.safetensors").is_file()
        else None
    )
    config = None if run is None else read_saved_config(run)
    return Source(
        what="classifier",
        run=run,
        results=run or folder,
        config=config,
        name=name,
        overrides=overrides,
        keys=keys,
        pixels=Pixels(tuple(about["mean"]), tuple(about["std"]), evaluation["data"]["crop_pct"]),
        model=model.float().eval(),
        vit=model,
        patch_size=model.patch_embed.patch_size[0],
        grid=tuple(model.patch_embed.grid_size),
        tensors=_plain(tensors),
        step=int(metadata.get("step", 0)),
        evaluation=evaluation,
        classes=_classes(evaluation["data"]["train"]),
    )


def _evaluations(folder: Path) -> str:
    found = sorted(str(path.parent) for path in folder.glob(f"*/{CLASSIFIER_FILE}"))
    return f": {' or '.join(found)}" if found else ""


def _classes(shards: str) -> list[str] | None:
    """The classes' names, where the shards are still here."""
    if not Path(shards).expanduser().is_dir():
        return None
    try:
        return ShardSet.open(shards, label="data.train").classes
    except UserError:
        return None


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:  # torch lists every key; the first says enough
        raise UserError(
            f"the weights in '{folder}' don't fit its config.yaml ({' '.join(str(error).split())[:200]}); are they another run's?"
        ) from None


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, otherwise: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"'{path}' is not there; {otherwise}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}); copy it again") from None
