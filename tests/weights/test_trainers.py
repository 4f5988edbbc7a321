"""Files of other trainers: the network in them is found by its content, and what was read is said."""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import shlex
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict

from dmae_ds.errors import UserError
from dmae_ds.weights.choose import choose_format
from dmae_ds.weights.containers import open_container
from dmae_ds.weights.formats import FORMATS
from dmae_ds.weights.label import TEACHER
from dmae_ds.weights.named import open_weights
from tests.messages import refused
from tests.teacher.reference import TAP
from tests.teacher.references import build_reference, fit, needed_by

REFERENCE = build_reference("timm")
GOOD = REFERENCE.tensors
RAW = {name: tensor * 0.5 for name, tensor in GOOD.items()}
NEEDED = needed_by(REFERENCE.name, tuple(REFERENCE.overrides.items()))


def under(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def in_every_block(wrapper: str, tensors: dict) -> dict:
    return {re.sub(r"(blocks\.\d+\.)", rf"\1{wrapper}", name): tensor for name, tensor in tensors.items()}


def settings() -> dict:
    """Plain data that trainers pickle: of numpy, pathlib and collections."""
    counts = collections.defaultdict(list)
    counts["val"].append(np.float64(0.5))
    return {"path": pathlib.Path("data"), "best": np.float64(0.7), "counts": counts, "dtype": np.dtype("f4")}


HEAD = {"head.mlp.0.weight": torch.ones(3, 32)}
ADAM = {"state": {0: {"exp_avg": torch.randn(5)}}, "param_groups": [{"lr": 0.1}]}
# {what: (content, words of the note)}; the network that counts is GOOD.
LAYOUTS = {
    "lightning": (
        {
            "state_dict": under("model.", GOOD) | {"criterion.weight": torch.ones(3)},
            "pytorch-lightning_version": "2.4.0",
            "hyper_parameters": settings(),
            "optimizer_states": [ADAM],
        },
        ["state_dict.model.", "criterion.weight"],
    ),
    "timm": ({"state_dict": GOOD, "args": argparse.Namespace(lr=1), "metric": np.float64(80.1)}, []),
    "timm-ema": (
        {"state_dict": RAW, "state_dict_ema": under("module.", GOOD), "optimizer": ADAM},
        ["state_dict_ema.module.", "EMA", "`state_dict.`"],
    ),
    "deit": ({"model": RAW, "model_ema": GOOD, "epoch": 3}, ["model_ema.", "EMA", "`model.`"]),
    "no-ema": ({"model": GOOD, "model_ema": None}, []),
    "dino": (
        {
            "student": under("module.backbone.", RAW) | under("module.", HEAD),
            "teacher": under("backbone.", GOOD) | HEAD,
            "optimizer": ADAM,
        },
        ["teacher.backbone.", "student.module.backbone.", "head.mlp.0.weight"],
    ),
    "mocov3": (
        {
            "state_dict": under("module.base_encoder.", GOOD)
            | under("module.momentum_encoder.", RAW)
            | under("module.predictor.", HEAD)
        },
        ["base_encoder", "momentum_encoder", "predictor"],
    ),
    "ijepa": (
        {"encoder": under("module.", RAW), "target_encoder": under("module.", GOOD), "opt": ADAM},
        ["target_encoder.module.", "`encoder.module.`"],
    ),
    "ema-callback": (
        {"state_dict": under("model.", RAW) | under("ema_model.module.", GOOD)},
        ["state_dict.ema_model.module.", "EMA"],
    ),
    "compiled": (under("module._orig_mod.", GOOD), []),
    "compiled-blocks": ({"model_state_dict": in_every_block("_orig_mod.", GOOD)}, []),
    "fsdp": (in_every_block("_fsdp_wrapped_module._checkpoint_wrapped_module.", under("module.", GOOD)), []),
    "nested": ({"checkpoint": {"step": 3, "network": {"params": GOOD}}}, []),
    "numbers-between": ({**GOOD, "epoch": 3, "_extra_state": None}, []),
    "deepspeed": ({"module": under("student.", GOOD) | {"dist_token": torch.ones(1)}}, ["student."]),
}


def test_settings_of_lightning_and_omegaconf_are_skipped_and_nothing_of_theirs_is_run(tmp_path, monkeypatch):
    """Also where they hold a tensor, which comes first in the file."""
    made = []

    class AttributeDict(dict):
        __module__ = "pytorch_lightning.utilities.parsing"

    class DictConfig:
        __module__ = "omegaconf.dictconfig"

        def __setstate__(self, state):
            made.append(state)

    for cls in (AttributeDict, DictConfig):
        cls.__qualname__ = cls.__name__
        module = types.ModuleType(cls.__module__)
        setattr(module, cls.__name__, cls)
        for name in (cls.__module__.split(".")[0], cls.__module__):
            monkeypatch.setitem(sys.modules, name, module)
    config = DictConfig()
    config.content = {"weights": torch.randn(96, 32), "lr": 0.1}
    path = tmp_path / "last.ckpt"
    torch.save({"cfg": config, "hparams": AttributeDict(lr=0.1), "state_dict": under("model.", GOOD)}, path)
    assert_good(choose(path))
    assert not made
    AttributeDict.__module__ = "my_lab.config"
    for name in ("my_lab", "my_lab.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["my_lab.config"].AttributeDict = AttributeDict
    torch.save({"hparams": AttributeDict(lr=0.1), "state_dict": GOOD}, tmp_path / "own.pth")
    with refused("own.pth", "my_lab.config.AttributeDict", "safetensors"):
        choose(tmp_path / "own.pth")


def choose(path):
    return choose_format(path, NEEDED, depth=TAP, may_resize=False, label=TEACHER)


def assert_good(weights) -> None:
    for name in NEEDED:
        assert torch.equal(weights[name], GOOD[name]), name


@pytest.mark.parametrize("what", LAYOUTS)
def test_the_network_is_read_whatever_is_around_it(tmp_path, what):
    content, words = LAYOUTS[what]
    path = tmp_path / "checkpoint.ckpt"
    torch.save(content, path)
    weights = choose(path)
    assert_good(weights)
    assert_good(open_weights(path, "timm", label=TEACHER))
    note = weights.container.note
    assert [word for word in words if word not in note] == [] and bool(words) == bool(note), note


@pytest.mark.parametrize("what", ["timm-ema", "deit", "no-ema", "compiled"])
def test_of_several_networks_timm_reads_the_same(tmp_path, what):
    torch.save(LAYOUTS[what][0], tmp_path / "checkpoint.pth")
    timms = load_state_dict(tmp_path / "checkpoint.pth", weights_only=False)
    ours = choose(tmp_path / "checkpoint.pth")
    assert all(torch.equal(ours[name], timms[name]) for name in NEEDED)


@pytest.mark.parametrize("name", ["vit-300ep.pth.tar", "last.ckpt", "weights", "model.pyth", "a.pth"])
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_file_is_known_by_its_content(tmp_path, name, save):
    save(GOOD, tmp_path / name)
    assert_good(choose(tmp_path / name))


def test_a_file_of_torch_under_the_other_name_is_told_to_be_renamed(tmp_path):
    torch.save(GOOD, tmp_path / "a.safetensors")
    with refused("a.safetensors", "mv a.safetensors a.pth"):
        choose(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pth")
    assert_good(choose(tmp_path / "a.pth"))


def test_a_wrapped_safetensors_file_is_read(tmp_path):
    save_file(under("module.", GOOD), tmp_path / "model.safetensors")
    assert_good(choose(tmp_path))


@pytest.mark.parametrize("what", ["hf-vit", "hf-mae", "hf-dinov3", "dinov3", "dinov2-registers"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "student.net."])
def test_other_names_are_found_too(tmp_path, what, prefix):
    reference = build_reference(what)
    torch.save({"state_dict": under(prefix, reference.tensors)}, tmp_path / "last.ckpt")
    fit(reference, tmp_path / "last.ckpt")


def advised_formats(message: str) -> list[str]:
    match = re.search(r"(?:try|set) teacher\.format(?:=| to )(\w+)(?: or (\w+))?", message)
    return [name for name in match.groups() if name] if match else []


@pytest.mark.parametrize("what", ["timm", "mae", "hf-vit", "hf-dinov3", "dinov2-training", "dinov3"])
def test_advice_on_a_format_leads_to_the_file_in_one_step(tmp_path, what):
    reference = build_reference(what)
    for entry, prefix in (("state_dict", "net."), ("teacher", "")):
        path = tmp_path / f"{entry}.ckpt"
        torch.save({entry: under(prefix, reference.tensors)}, path)
        for format in FORMATS:
            try:
                fit(reference, path, format)
            except UserError as error:
                advised = advised_formats(str(error))
                assert advised, error
                for name in advised:
                    fit(reference, path, name)


def test_networks_that_nothing_tells_apart_are_refused_with_a_command_that_works(tmp_path):
    """A large teacher next to a student is no average of it."""
    path = tmp_path / "last.ckpt"
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in GOOD.items()}
    torch.save({"state_dict": under("student.", GOOD) | under("teacher.", wide)}, path)
    with refused("teacher.weights", path, "state_dict.student.", "state_dict.teacher.") as raised:
        choose(path)
    command = str(raised.value).partition("python ")[2]
    done = subprocess.run(
        [sys.executable, *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_good(choose(tmp_path / "network.safetensors"))
    torch.save({"a": GOOD, "b": RAW}, path)
    with refused("`a.`", "`b.`"):
        choose(path)


ODD = {
    "int8": torch.ones(3, dtype=torch.int8),
    "uint16": torch.ones(3, dtype=torch.uint16),
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_an_odd_dtype_matters_only_in_a_tensor_that_is_needed(tmp_path, kind, save):
    path = tmp_path / "weights"
    save(GOOD | {"head.scale": ODD[kind]}, path)
    assert_good(choose(path))
    if kind == "float8":
        return
    save(GOOD | {"blocks.0.norm1.weight": torch.ones(32).to(ODD[kind].dtype)}, path)
    with refused("blocks.0.norm1.weight", str(ODD[kind].dtype).removeprefix("torch."), "floating-point"):
        fit(REFERENCE, path, "timm")


def test_a_sparse_or_unknown_tensor_that_is_not_needed_is_left_alone(tmp_path):
    torch.save(GOOD | {"head.mask": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    assert_good(choose(tmp_path / "sparse.pth"))
    save_file(GOOD | {"head.scale": torch.ones(4, dtype=torch.uint8)}, tmp_path / "new.safetensors")
    data = (tmp_path / "new.safetensors").read_bytes()
    (tmp_path / "new.safetensors").write_bytes(data.replace(b'"U8"', b'"X8"', 1))
    assert_good(choose(tmp_path / "new.safetensors"))


SIGNS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html></html>", "download"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gunzip"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(40), "Keras"),
    "json": (b'{"a": 1}', "JSON"),
    "empty": (b"", "copy"),
    "noise": (bytes(range(7, 250)), "torch.save"),
}


@pytest.mark.parametrize("what", SIGNS)
@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "model"])
def test_what_is_no_weights_file_is_told(tmp_path, what, name):
    content, word = SIGNS[what]
    (tmp_path / name).write_bytes(content)
    with refused("teacher.weights", tmp_path / name, word):
        choose(tmp_path / name)


def test_numpy_archives_and_torchscript_are_told(tmp_path):
    np.savez(tmp_path / "vit.npz", a=np.ones(3))
    with refused("vit.npz", "timm.create_model"):
        choose(tmp_path / "vit.npz")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"program/{name}", b"")
    with refused("program.pt", "TorchScript", "state_dict"):
        choose(tmp_path / "program.pt")


def test_a_folder_of_checkpoints_names_the_run(tmp_path):
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000005"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    for folder in (step, step.parent):
        with refused(folder, "run folder", "student.safetensors"):
            open_container(folder)
    save_file(GOOD, run / "student.safetensors")
    for folder in (step, step.parent):
        with refused(folder, f"run folder {run}"):
            open_container(folder)
    assert_good(choose(run))


def test_other_folders_name_what_to_give(tmp_path):
    (tmp_path / "ds" / "checkpoint").mkdir(parents=True)
    torch.save({}, tmp_path / "ds" / "checkpoint" / "mp_rank_00_model_states.pt")
    with refused("DeepSpeed", "zero_to_fp32.py"):
        open_container(tmp_path / "ds")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    with refused("distributed checkpoint", "dcp_to_torch"):
        open_container(tmp_path / "dcp")
    (tmp_path / "evaluation").mkdir()
    save_file(GOOD, tmp_path / "evaluation" / "best.safetensors")
    with refused(tmp_path / "evaluation", "best.safetensors"):
        open_container(tmp_path / "evaluation")
