"""The network and the data of an evaluation on frozen features: a run's, or any weights file with any data.

dmae-ds eval knn RUN                                       the run's student and its data
dmae-ds eval knn RUN data.train=SHARDS data.val=SHARDS     its student, other data
dmae-ds eval knn FILE data.train=SHARDS data.val=SHARDS run.dir=FOLDER [network.name=NAME]
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmae_ds.config.data import DataConfig
from dmae_ds.config.evaluation import FrozenConfig
from dmae_ds.config.load import build_config, read_saved_config
from dmae_ds.config.networks import ModelConfig, looks_like_hub_id
from dmae_ds.config.own_file import network_in
from dmae_ds.errors import UserError
from dmae_ds.evaluate.early import split_words
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.weights.content import identify
from dmae_ds.weights.hub import locate, timm_tag
from dmae_ds.weights.label import WEIGHTS, Label

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class FrozenSource:
    """Network, data, and the folder that gets results, drawn subsets and cached features.

    run: the run folder; None for a weights file; file, format, label: of the weights, where there is no run
    """

    network: ModelConfig
    data: DataConfig
    results: Path
    run: Path | None = None
    file: Path | None = None
    format: str = "auto"
    label: Label = WEIGHTS
    tf32: bool = True

    def read_step(self) -> int:
        """The step of the weights; 0 where the file does not have it."""
        if self.run is not None:
            from dmae_ds.evaluate.features import read_step

            return read_step(self.run) if (self.run / "student.safetensors").is_file() else 0
        header = read_header(self.file) if self.file.is_file() else None
        step = "0" if header is None else header.metadata.get("step", "0")
        return int(step) if step.isdigit() else 0

    def settings(self) -> dict[str, str]:
        """The part of a result's settings that tells weights files apart; {} for a run's own student."""
        if self.run is not None:
            return {}
        return {"weights": f"{self.file.name} {identify(self.file)[1]:08x}"}

    def load(self) -> VisionTransformer:
        """Load the network into timm's own class, in eval mode.

        Raises UserError for a file that does not fit.
        """
        from dmae_ds.evaluate.features import build_timm, load_student
        from dmae_ds.weights.load import load_network

        if self.run is not None:
            return load_student(self.run)
        model = build_timm(self.network)
        loaded = load_network(
            self.file,
            model.state_dict(),
            network=(self.network.name, self.network.overrides()),
            depth=len(model.blocks),
            grid=model.patch_embed.grid_size,
            num_prefix=0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens,
            label=self.label,
            format=self.format,
        )
        model.load_state_dict(loaded.tensors, strict=True)
        return model.eval()


def source_of_run(run: Path) -> FrozenSource:
    """A run's student with the run's data. Raises UserError for a folder that is not a run."""
    config = read_saved_config(run, student_only=True)
    return FrozenSource(config.student, config.data, results=run, run=run, tf32=config.tf32)


def find_sources(words: list[str]) -> list[FrozenSource]:
    """The sources that the words of a command name: run folders and weights files, then overrides.

    Raises UserError.
    """
    places, overrides = split_words(words)
    if not places:
        raise UserError(
            "no run was given; write a run folder or a weights file before data.train= and data.val="
        )
    if len(places) > 1 and any(override.startswith("run.dir=") for override in overrides):
        raise UserError("run.dir is for one run or file; evaluate them one after the other, or leave it out")
    return [_find(place, overrides) for place in places]


def _find(word: str, overrides: list[str]) -> FrozenSource:
    path = Path(word).expanduser()
    if (path / "config.yaml").is_file() or (path.is_dir() and not overrides):
        return _of_run(path, overrides)
    if not path.exists() and not looks_like_hub_id(word):
        raise UserError(
            f"'{word}' is neither a run folder nor a weights file; give a run of `dmae-ds train`, a "
            ".safetensors or .pth file, or a hub id"
        )
    file = locate(word, label=WEIGHTS)
    values = {"weights": word, "run": {}, "data": {}, "network": network_in(file)}
    config = build_config(values, overrides, schema=FrozenConfig)
    data = config.data
    if not {"mean", "std"} & data.model_fields_set and "." in config.network.name:
        tag = None if ":" in config.network.name else timm_tag(config.network.name)
        if tag is not None:
            data = data.model_copy(update={"mean": tuple(tag.mean), "std": tuple(tag.std)})
    return FrozenSource(
        config.network, data, results=Path(config.run.dir).expanduser(), file=file, format=config.format
    )


def _of_run(run: Path, overrides: list[str]) -> FrozenSource:
    """A run's student, with other data where overrides name some: results then get a folder of their own."""
    if not overrides:
        return source_of_run(run)
    wrong = next((each for each in overrides if not each.startswith(("data", "run."))), None)
    if wrong is not None:
        raise UserError(f"'{wrong}' is for a weights file; '{run}' is a run folder, and its network is known")
    saved = read_saved_config(run, student_only=True)
    own_data = saved.data.model_dump(mode="json", include=set(DataConfig.model_fields) - {"repeat"})
    values = {
        "weights": str(run),
        "run": {"dir": str(run)},
        "network": saved.student.model_dump(exclude_none=True, include=set(ModelConfig.model_fields)),
        "data": dict(own_data),
    }
    config = build_config(values, overrides, schema=FrozenConfig)
    results = Path(config.run.dir).expanduser()
    if results == run and config.data.model_dump(mode="json", exclude={"repeat"}) != own_data:
        # The run's own results and reports stay as they are.
        digest = hashlib.sha256(config.data.model_dump_json().encode()).hexdigest()[:8]
        results = run / f"on-{Path(config.data.val or config.data.train).name}-{digest}"
    return FrozenSource(config.network, config.data, results=results, run=run, tf32=saved.tf32)
