"""Reads exports with their own library alone: `python -I alone.py LIBRARY FOLDER FILE [FOLDER FILE ...]`.

Nothing of this project can be imported here. Each FILE is an .npz of inputs and expected outputs. It prints
the largest difference of each folder, as JSON.
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
ALL = {"dmae_ds", "data_prep", "tests", "timm", "torch", "transformers", "onnxruntime"}
for module in ALL - MAY_IMPORT[LIBRARY]:
    sys.modules[module] = None  # importing it is an ImportError from now on

import numpy as np  # noqa: E402


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
    with open(f"{folder}/config.json") as file:
        config = json.load(file)
    named = timm.create_model(
        config["architecture"],
        checkpoint_path=f"{folder}/model.safetensors",
        num_classes=config["num_classes"],
        **config["model_args"],
    ).eval()
    return [run_timm(network, given) for network in (model, named)]


def run_timm(model, given):
    import torch

    pixels = torch.from_numpy(given["pixels"])
    with torch.no_grad():
        if "logits" in given:
            return {"logits": model(pixels).numpy()}
        return {"tokens": model.forward_features(pixels).numpy()}


def read_plain_file(folder, given):
    import safetensors
    import timm

    part = "classifier" if "logits" in given else "student"
    with safetensors.safe_open(f"{folder}/{part}.safetensors", "pt") as file:
        names, metadata = file.keys(), file.metadata()
        tensors = {name: file.get_tensor(name) for name in names}
    assert metadata["step"] == "1234"
    model = timm.create_model(
        metadata["timm_name"], **json.loads(metadata["timm_overrides"]), **json.loads(metadata["timm_keys"])
    ).eval()
    model.load_state_dict(tensors, strict=True)
    return [run_timm(model, given)]


def read_transformers(folder, given):
    import torch
    from transformers import AutoModel, AutoModelForImageClassification, ViTMAEForPreTraining

    pixels, noise = (torch.from_numpy(given[name]) for name in ("pixels", "noise"))
    with torch.no_grad():
        if "tokens" in given:
            with open(f"{folder}/config.json") as file:
                (class_name,) = json.load(file)["architectures"]
            options = {"add_pooling_layer": False} if class_name == "ViTModel" else {}
            model = AutoModel.from_pretrained(folder, **options).eval()
            assert type(model).__name__ == class_name
            return [{"tokens": model(pixels).last_hidden_state.numpy()}]
        if "logits" in given:
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            return [{"logits": model(pixels).logits.numpy()}]
        output = ViTMAEForPreTraining.from_pretrained(folder).eval()(pixels, noise=noise)
    ids_masked = torch.from_numpy(given["ids_masked"])
    assert output.mask.sum() == ids_masked.numel()
    reconstructed = output.logits[torch.arange(len(ids_masked))[:, None], ids_masked]
    return [{"pixels_reconstructed": reconstructed.numpy(), "loss": output.loss.numpy()}]


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
