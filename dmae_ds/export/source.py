"""The network to export and its outputs: a run's student, with or without decoder, or a network made of it.

The outputs are those of the network that was trained (`models/vit.py` and the objective, the classifier of
`dmae-ds eval finetune` and `linear`, or the segmenter of `dmae-ds eval segment`), not of a copy in another
library; an export must give the same.
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
from dmae_ds.dense.segmenter_file import load_segmenter
from dmae_ds.errors import UserError
from dmae_ds.models.masking import keep_random
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import build_student
from dmae_ds.objectives.build import build_objective

NUM_INPUTS = 3
# Python for a card: the pixels that training saw, which `convert("RGB")` of a transparent image does not give
OPEN_IMAGE = """import numpy, PIL.Image
image = PIL.Image.open("image.png")
if image.mode.startswith("I"):  # 16-bit grey: the upper byte stays, as in training
    image = PIL.Image.fromarray((numpy.asarray(image) >> 8).astype("uint8"))
image = image.convert("RGBA")  # what is transparent becomes white
image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")"""
CLASSIFIER_FILE = "last.safetensors"  # of the epoch that results.jsonl reports
STUDENTS = ("encoder", "mae")  # parts of a run folder; the others are of an evaluation's


@dataclass(frozen=True)
class Inputs:
    """Inputs for comparing an export.

    pixels: [N, C, H, W] float32, as after normalisation; noise: [N, L], of masks
    """

    pixels: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Pixels:
    """How an image is prepared for the network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float


@dataclass(frozen=True)
class Source:
    """A trained network and what is known about it.

    what: `encoder` (model is a MaskedViT), `mae` (the objective), `classifier` (a timm network) or
      `segmenter` (dense/segmenter.py)
    run: the training run; None for a classifier or segmenter that did not start from one
    results: the folder whose results.jsonl belongs to the network
    name, overrides, keys: timm's name of the network, its numbers, and the arguments of its head
    model, vit: the network in eval mode, float32, on the CPU; and its encoder
    tensors: the weights, the encoder's under timm's names; step: of the student
    evaluation, classes: config of the evaluation and names of the classes, for a classifier or segmenter
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
    def channels(self) -> int:
        return len(self.pixels.mean)

    @property
    def num_prefix(self) -> int:
        """Number of tokens in front of the patches: CLS and registers."""
        return self.vit.num_prefix if self.what in STUDENTS else self.vit.num_prefix_tokens

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def inputs(self, seed: int = 0) -> Inputs:
        """Return random inputs, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        shape = (NUM_INPUTS, self.channels, self.img_size, self.img_size)
        pixels = torch.randn(shape, generator=generator)
        return Inputs(pixels, torch.rand(NUM_INPUTS, self.num_patches, generator=generator))

    @torch.no_grad()
    def outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return what the trained network computes.

        encoder: `tokens` [N, R + L, D] after the final norm, with CLS and registers in front
        classifier: `logits` [N, classes]; segmenter: `logits` [N, classes, H, W]
        mae: `pixels` [N, L - K, P * P * C], reconstructed, in the order of the noise; and `loss`
        """
        if self.what not in STUDENTS:
            return {"logits": self.model(inputs.pixels)}
        if self.what == "encoder":
            everything = torch.arange(self.num_patches).expand(len(inputs.pixels), -1)
            return {"tokens": self.vit(patchify(inputs.pixels, self.patch_size), everything)[0]}
        batch = self.model.prepare(Batch(inputs.pixels, inputs.noise), nn.Identity())
        latent, _ = self.vit(batch.visible, batch.ids_keep)
        reconstructed = self.model.decoder(latent, batch.ids_keep, batch.ids_masked)
        return {"pixels": reconstructed.flatten(2), "loss": self.model.pixel_loss(latent, batch)}

    def rounding(self, inputs: Inputs) -> dict[str, float]:
        """Return the distance of each float32 output from the float64 one: {output: largest difference}.

        No export can be required to be nearer than that.
        """
        single = self.outputs(inputs)
        self.model.double()
        double = self.outputs(Inputs(inputs.pixels.double(), inputs.noise))
        self.model.float()
        return {name: float((single[name].double() - double[name]).abs().max()) for name in single}

    def ids_masked(self, noise: Tensor) -> Tensor:
        """Return [N, L - K]: the patches that a mask of this noise removes, in the order of `pixels`."""
        return keep_random(noise, self.model.num_visible)[1]


def open_source(folder: Path, what: str) -> Source:
    """Read a run folder (encoder, mae) or an evaluation's (classifier, segmenter). Raises UserError.

    Every tensor of the network must be in the file, and no other.
    """
    if what in STUDENTS:
        return _open_student(folder, what)
    return _open_classifier(folder) if what == "classifier" else _open_segmenter(folder)


def _open_student(run: Path, what: str) -> Source:
    if (run / CLASSIFIER_FILE).is_file():
        metadata = _read(run / CLASSIFIER_FILE, "")[1]
        kinds = [kind for kind in ("classifier", "segmenter") if kind in metadata]
        advice = f"give --what {kinds[0]}, or the run's folder" if kinds else "give the run's folder"
        raise UserError(f"'{run}' is the folder of an evaluation; {advice}")
    config = read_saved_config(run, student_only=what == "encoder")
    tensors, metadata = _read(
        run / "student.safetensors",
        "a run writes it with its first checkpoint: wait for one, or set checkpoint.every_steps lower",
    )
    if what == "encoder":
        model: nn.Module = build_student(
            config.student.name, config.student.overrides(), generator=torch.Generator().manual_seed(0)
        )
        model.drops_registers = False  # other libraries give them
        weights, vit = tensors, model
    else:
        rest, rest_metadata = _read(run / "decoder.safetensors", "a run writes it with its first checkpoint")
        if rest_metadata.get("step") != metadata.get("step"):
            raise UserError(
                f"student.safetensors is of step {metadata.get('step')}, decoder.safetensors of step "
                f"{rest_metadata.get('step')}: the run is saving now; try again"
            )
        model, _ = build_objective(config)
        if not model.reconstructs_pixels:
            raise UserError(
                f"objective {config.objective.name} trains no pixel decoder; export --what encoder"
            )
        weights, vit = {f"student.{name}": tensor for name, tensor in tensors.items()} | rest, model.student
        tensors |= {name: tensor for name, tensor in rest.items() if name.startswith("decoder.")}
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
        path, f"give the folder that `dmae-ds eval finetune` or `linear` wrote{_evaluations(folder)}"
    )
    if "classifier" not in metadata:
        raise UserError(f"'{path}' is no classifier; give another --what")
    evaluation = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    head = json.loads(metadata["classifier"])
    name, overrides, keys = metadata["timm_name"], json.loads(metadata["timm_overrides"]), head["keys"]
    model = timm.create_model(name, **overrides, **keys)
    _fill(model, tensors, folder)
    run, config = _run_of(folder)
    return Source(
        what="classifier",
        run=run,
        results=run or folder,
        config=config,
        name=name,
        overrides=overrides,
        keys=keys,
        pixels=Pixels(tuple(head["mean"]), tuple(head["std"]), evaluation["data"]["crop_pct"]),
        model=model.float().eval(),
        vit=model,
        patch_size=model.patch_embed.patch_size[0],
        grid=tuple(model.patch_embed.grid_size),
        tensors=_plain(tensors),
        step=int(metadata.get("step", 0)),
        evaluation=evaluation,
        classes=_classes(evaluation["data"]["train"]),
    )


def _open_segmenter(folder: Path) -> Source:
    path = folder / CLASSIFIER_FILE
    tensors, metadata = _read(
        path, f"give the folder that `dmae-ds eval segment` wrote{_evaluations(folder)}"
    )
    model, facts = load_segmenter(path, label="the weights")
    run, config = _run_of(folder)
    vit = model.backbone
    return Source(
        what="segmenter",
        run=run,
        results=run or folder,
        config=config,
        name=facts.network.name,
        overrides=facts.network.overrides(),
        keys={"num_classes": len(facts.classes), "head": facts.head.name},
        pixels=Pixels(tuple(facts.mean), tuple(facts.std), 1.0),
        model=model,
        vit=vit,
        patch_size=vit.patch_embed.patch_size[0],
        grid=tuple(vit.patch_embed.grid_size),
        tensors=_plain(tensors),
        step=int(metadata.get("step", 0)),
        evaluation=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        classes=facts.classes,
    )


def _run_of(folder: Path) -> tuple[Path | None, RunConfig | None]:
    """The training run that an evaluation's folder is in, with its config; (None, None) for a file's."""
    run_files = [folder.parent / name for name in ("config.yaml", "student.safetensors")]
    if not all(path.is_file() for path in run_files):
        return None, None
    return folder.parent, read_saved_config(folder.parent, student_only=True)


def _evaluations(folder: Path) -> str:
    folders = sorted(str(path.parent) for path in folder.glob(f"*/{CLASSIFIER_FILE}"))
    return f": {' or '.join(folders)}" if folders else ""


def _classes(shards: str) -> list[str] | None:
    """Return the names of the classes, or None where the shards are not on this machine any more."""
    if not Path(shards).expanduser().is_dir():
        return None
    try:
        return ShardSet.open(shards, label="data.train").classes
    except UserError:
        return None


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:  # torch lists every key; the first ones are enough
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights in '{folder}' don't fit its config.yaml ({reason}); "
            "copy both files from the same run"
        ) from None


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _read(path: Path, otherwise: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"'{path}' not found; {otherwise}")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # the file itself can't be iterated
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}); copy it again") from None
