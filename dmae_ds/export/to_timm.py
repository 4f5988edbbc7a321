"""`dmae-ds export --to timm` and `--to safetensors`: a folder that timm loads, and one plain file.

`timm.create_model("local-dir:DIR", pretrained=True)` loads the folder. config.json is timm's layout of a hub
repository. It is written here and not by timm's own `save_for_hf`, which copies the tag, licence and papers
of the name's published weights into a file that holds other weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import timm
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.export.source import OPEN_IMAGE, Inputs, Source
from dmae_ds.output.durable import write_tensors
from dmae_ds.train.checkpoint.student_file import python_that_loads

WEIGHTS = "model.safetensors"  # timm's name, and transformers'
OLDEST = (1, 0, 26)  # before it, timm unpickled any weights in a local folder


def write_timm(source: Source, folder: Path) -> None:
    """Write model.safetensors and config.json. Raises UserError for a timm that can't read them."""
    if not reads_folders(timm.__version__):
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"timm {timm.__version__} can't read safetensors from a folder; "
            f"run pip install 'timm>={oldest}', or export --to safetensors"
        )
    _write_weights(source, folder / WEIGHTS)
    num_classes = source.keys["num_classes"]
    head = {key: value for key, value in source.keys.items() if key != "num_classes"}
    size, pixels = [3, source.img_size, source.img_size], source.pixels
    config = {
        "architecture": _architecture(source),
        "num_classes": num_classes,
        "num_features": source.vit.embed_dim,
        "global_pool": head.get("global_pool", "token"),
        **({} if source.classes is None else {"label_names": source.classes}),
        "model_args": {**source.overrides, **head},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": pixels.crop_pct,
            "crop_mode": "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if "head_dist.weight" in source.tensors else "head",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def reads_folders(version: str) -> bool:
    """Return whether this timm reads model.safetensors of a local folder."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) >= OLDEST


def run_timm(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """Return what timm's network computes, built from the folder alone."""
    return _output(source, timm.create_model(f"local-dir:{folder}", pretrained=True), inputs)


def explain_timm(source: Source, name: str) -> str:
    """Return Python that loads it."""
    by_name = f'"{_architecture(source)}", checkpoint_path="{name}/{WEIGHTS}"{_arguments(source)}'
    return f"""{OPEN_IMAGE}
import timm
model = timm.create_model("local-dir:{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(image)[None]
{_call(source)}
# the same by name: timm.create_model({by_name})"""


def plain_file(source: Source) -> str:
    """Return the name of the plain file."""
    return "classifier.safetensors" if source.what == "classifier" else "student.safetensors"


def write_safetensors(source: Source, folder: Path) -> None:
    """Write one file, whose metadata names the network."""
    _write_weights(source, folder / plain_file(source))


def run_safetensors(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """Return what the timm network computes that the file's metadata names, loaded strictly."""
    path = folder / plain_file(source)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(
        metadata["timm_name"], **json.loads(metadata["timm_overrides"]), **json.loads(metadata["timm_keys"])
    )
    model.load_state_dict(load_file(path), strict=True)
    return _output(source, model, inputs)


def explain_safetensors(source: Source, name: str) -> str:
    """Return Python that loads it."""
    arguments = {**source.keys, **source.overrides}
    loads = python_that_loads(source.name, arguments, f"{name}/{plain_file(source)}")
    return f"{loads}\n{_call(source)}"


def _output(source: Source, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    model.eval()
    if source.what == "classifier":
        return {"logits": model(inputs.pixels)}
    return {"tokens": model.forward_features(inputs.pixels)}


def _call(source: Source) -> str:
    if source.what == "classifier":
        return f"logits = model(pixels)  # [N, {source.keys['num_classes']}]"
    shape = f"[N, {source.num_prefix + source.num_patches}, {source.vit.embed_dim}]"
    order = {0: "patches alone", 1: "CLS first"}.get(source.num_prefix, "CLS first, registers, patches")
    return f"tokens = model.forward_features(pixels)  # {shape}, {order}"


def _arguments(source: Source) -> str:
    return "".join(f", {key}={value!r}" for key, value in {**source.keys, **source.overrides}.items())


def _write_weights(source: Source, path: Path) -> None:
    _architecture(source)
    metadata = {
        "format": "pt",
        "timm_name": source.name,
        "timm_overrides": json.dumps(source.overrides),
        "timm_keys": json.dumps(source.keys),
        "step": str(source.step),
    }
    write_tensors(path, source.tensors, metadata)


def _architecture(source: Source) -> str:
    if ":" in source.name:
        raise UserError(
            f"student.name '{source.name}' is not a name of timm's, so timm can't build it; "
            "export --to onnx or hf"
        )
    return source.name.partition(".")[0]
