"""--to timm: a folder that `timm.create_model("local-dir:DIR", pretrained=True)` loads; --to safetensors: one plain file in the same names.

config.json is timm's layout of a hub repository. It is written here and not by timm's own `save_for_hf`, which copies
what timm knows of the name's published weights (their tag, licence and papers) into a file that holds other weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.export.source import Inputs, Source

WEIGHTS = "model.safetensors"  # timm's name, and transformers'
OLDEST = (1, 0, 26)  # before it, timm unpickled whatever it found in a local folder


def write_timm(source: Source, folder: Path) -> None:
    """model.safetensors and config.json. Raises UserError for a timm that couldn't read them."""
    if not reads_folders(timm.__version__):
        raise UserError(
            f"timm {timm.__version__} reads no safetensors out of a folder; pip install 'timm>={'.'.join(map(str, OLDEST))}', or export --to safetensors"
        )
    _write_weights(source, folder / WEIGHTS)
    num_classes, head = (
        source.keys["num_classes"],
        {key: value for key, value in source.keys.items() if key != "num_classes"},
    )
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
    """Whether this timm reads model.safetensors of a local folder."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) >= OLDEST


def ask_timm(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """What timm's network answers, built from the folder alone."""
    return _answer(source, timm.create_model(f"local-dir:{folder}", pretrained=True), inputs)


def explain_timm(source: Source, name: str) -> str:
    """Python that loads it."""
    return f"""import timm
model = timm.create_model("local-dir:{name}", pretrained=True).eval()
{_call(source)}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
# the same by name: timm.create_model("{_architecture(source)}", checkpoint_path="{name}/{WEIGHTS}"{_arguments(source)})"""


def plain_file(source: Source) -> str:
    """Its name."""
    return "classifier.safetensors" if source.what == "classifier" else "student.safetensors"


def write_safetensors(source: Source, folder: Path) -> None:
    """One file, whose metadata names the network."""
    _write_weights(source, folder / plain_file(source))


def ask_safetensors(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """The file, loaded strictly into the timm network that its metadata names."""
    path = folder / plain_file(source)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(
        metadata["timm_name"], **json.loads(metadata["timm_overrides"]), **json.loads(metadata["timm_keys"])
    )
    model.load_state_dict(load_file(path), strict=True)
    return _answer(source, model, inputs)


def explain_safetensors(source: Source, name: str) -> str:
    """Python that loads it."""
    return f"""import safetensors.torch, timm
model = timm.create_model("{source.name}"{_arguments(source)}).eval()
model.load_state_dict(safetensors.torch.load_file("{name}/{plain_file(source)}"))  # strict
{_call(source)}"""


def _answer(source: Source, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    model.eval()
    return (
        {"logits": model(inputs.pixels)}
        if source.what == "classifier"
        else {"tokens": model.forward_features(inputs.pixels)}
    )


def _call(source: Source) -> str:
    if source.what == "classifier":
        return f"logits = model(pixels)  # [N, {source.keys['num_classes']}]"
    return f"tokens = model.forward_features(pixels)  # [N, {1 + source.num_patches}, {source.vit.embed_dim}], CLS first"


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
    save_file(source.tensors, path, metadata=metadata)


def _architecture(source: Source) -> str:
    if ":" in source.name:
        raise UserError(
            f"student.name '{source.name}' is a network of your own, which timm can't build by name; export --to onnx or hf"
        )
    return source.name.partition(".")[0]
