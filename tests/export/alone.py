"""Run as `python -I alone.py LIBRARY FOLDER ...`: an export read by its own library, where nothing of this project can be imported.

Each FOLDER is followed by an .npz of inputs and expected answers. Prints the largest difference of each folder, as JSON.
"""

import json
import os
import sys

LIBRARY, *ARGUMENTS = sys.argv[1:]
MAY_IMPORT = {
    "timm": {"timm", "torch"},
    "transformers": {"transformers", "torch"},
    "onnxruntime": {"onnxruntime"},
}
for module in {"dmae_ds", "data_prep", "tests", "timm", "torch", "transformers", "onnxruntime"} - MAY_IMPORT[
    LIBRARY
]:
    sys.modules[module] = None  # importing it is an ImportError from now on

import numpy as np


def read_timm(folder, given):
    import timm

    if not os.path.exists(f"{folder}/config.json"):
        return read_plain_file(folder, given)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    assert (
        data["input_size"] == given["pixels"].shape[1:]
        and data["crop_pct"] == 0.8
        and data["interpolation"] == "bicubic"
    ), data
    assert list(data["mean"]) == [0.4, 0.5, 0.6] and list(data["std"]) == [0.2, 0.3, 0.25], data
    config = json.loads(open(f"{folder}/config.json").read())
    named = timm.create_model(
        config["architecture"],
        checkpoint_path=f"{folder}/model.safetensors",
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()
    return [ask_timm(network, given) for network in (model, named)]


def ask_timm(model, given):
    import torch

    pixels = torch.from_numpy(given["pixels"])
    with torch.no_grad():
        return (
            {"logits": model(pixels).numpy()}
            if "logits" in given
            else {"tokens": model.forward_features(pixels).numpy()}
        )


def read_plain_file(folder, given):
    import safetensors
    import timm

    with safetensors.safe_open(
        f"{folder}/{'classifier' if 'logits' in given else 'student'}.safetensors", "pt"
    ) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert metadata["step"] == "1234"
    model = timm.create_model(
        metadata["timm_name"], **json.loads(metadata["timm_overrides"]), **json.loads(metadata["timm_keys"])
    ).eval()
    model.load_state_dict(tensors, strict=True)
    return [ask_timm(model, given)]


def read_transformers(folder, given):
    import torch
    from transformers import AutoModel, AutoModelForImageClassification, ViTMAEForPreTraining

    pixels, noise = (torch.from_numpy(given[name]) for name in ("pixels", "noise"))
    with torch.no_grad():
        if "tokens" in given:
            model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
            assert type(model).__name__ == "ViTModel"
            return [{"tokens": model(pixels).last_hidden_state.numpy()}]
        if "logits" in given:
            return [
                {
                    "logits": AutoModelForImageClassification.from_pretrained(folder)
                    .eval()(pixels)
                    .logits.numpy()
                }
            ]
        found = ViTMAEForPreTraining.from_pretrained(folder).eval()(pixels, noise=noise)
    hidden = torch.from_numpy(given["ids_masked"])
    assert found.mask.sum() == hidden.numel()
    return [
        {
            "pixels_reconstructed": found.logits[torch.arange(len(hidden))[:, None], hidden].numpy(),
            "loss": found.loss.numpy(),
        }
    ]


def read_onnxruntime(folder, given):
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    pixels = given["pixels"]
    parts = [session.run(None, {"pixel_values": part})[0] for part in (pixels[:1], pixels[1:])]
    name = "logits" if "logits" in given else "tokens"
    return [{name: np.concatenate(parts)}, {name: session.run([name], {"pixel_values": pixels})[0]}]


differences = []
for folder, file in zip(ARGUMENTS[::2], ARGUMENTS[1::2], strict=True):
    given = dict(np.load(file))
    differences.append(
        max(
            float(np.abs(answers[name] - given[name]).max())
            for answers in globals()[f"read_{LIBRARY}"](folder, given)
            for name in answers
        )
    )
try:
    import dmae_ds  # noqa: F401
except ImportError:
    print(json.dumps(differences))
