"""Weights files that can't be trusted are refused with one line, and no code in them is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.weights.containers import open_container
from dmae_ds.weights.label import TEACHER
from tests.messages import refused
from tests.weights.files import tensors


def read_all(path: Path, **kwargs) -> None:
    """Open a file and read every tensor."""
    container = open_container(path, **kwargs)
    for name in container:
        container[name]


# Where a file is cut: in the header, right after it, inside a tensor, before the last byte.
@pytest.mark.parametrize("kept", [0, 4, 60, 0.3, 0.7, -100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_truncated_file_is_refused(tmp_path, kind, kept):
    path = tmp_path / f"whole.{kind}"
    (save_file if kind == "safetensors" else torch.save)(tensors(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with refused(path, "copy it again"):
        read_all(path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file(tensors(), path)
    container = open_container(path)
    os.truncate(path, path.stat().st_size - 4)
    with refused(path, path.stat().st_size, "copy it again"):
        [container[name] for name in container]


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": tensors(), "args": Touch(marker)}, tmp_path / "evil.pth")
    with refused(tmp_path / "evil.pth", "system", "safetensors"):
        read_all(tmp_path / "evil.pth", entries=("model",))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Touch(marker)))
    with refused(tmp_path / "plain.pth"):
        read_all(tmp_path / "plain.pth")
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # the proof that it would have
    assert marker.exists()


def test_a_file_older_than_the_zip_format_is_refused(tmp_path):
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with refused("old.pth", "torch 1.6"):
        read_all(tmp_path / "old.pth")


def damage_directory(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x01\x02", b"PK\x07\x07"))


def damage_end(path: Path) -> None:
    """The 64-bit end record places itself on another disk."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x06\x07\x00", b"PK\x06\x07\x07"))


def damage_pickle(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"storageq", b"storageX", 1))


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, payload in records.items():
            archive.writestr(name, payload)


@pytest.mark.parametrize("damage", [damage_directory, damage_end, damage_pickle, compress])
def test_a_damaged_or_compressed_pth_is_refused(tmp_path, damage):
    path = tmp_path / "damaged.pth"
    torch.save(tensors(), path)
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    with refused(path):
        read_all(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.randn(3, dtype=torch.complex64).conj()],
    ids=["sparse", "meta", "conjugated"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_tensor_without_plain_bytes_is_named(tmp_path, tensor):
    torch.save(tensors() | {"odd": tensor}, tmp_path / "odd.pth")
    with refused("odd.pth", "'odd'"):
        read_all(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, ["nothing"]),
        ([torch.ones(1)], ["list"]),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, ["epoch, weights", "'model'"]),
        ({"model": {"a": "text"}}, ["holds model"]),
        ({1: torch.ones(1)}, ["holds 1"]),
    ],
)
def test_the_content_of_a_pth_without_weights_is_named(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pth")
    with refused("other.pth", *words):
        read_all(tmp_path / "other.pth", entries=("model",))


def test_an_entry_of_another_format_names_that_format(tmp_path):
    torch.save({"model": tensors()}, tmp_path / "mae.pth")
    formats = {"state_dict": ["timm"], "model": ["mae"]}
    with refused("mae.pth", "'state_dict'", "teacher.format=mae"):
        read_all(tmp_path / "mae.pth", entries=("state_dict",), formats=formats, label=TEACHER)


def write_safetensors(path: Path, header: object, *, data: int = 16, length: int | None = None) -> Path:
    """Write a file with exactly this header; `length` is the header's size as the file has it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + bytes(data))
    return path


def entry(first: int, last: int, *, shape: list | None = None, dtype: str = "F32") -> dict:
    return {
        "dtype": dtype,
        "shape": [(last - first) // 4] if shape is None else shape,
        "data_offsets": [first, last],
    }


def test_the_hand_written_header_is_a_good_one(tmp_path):
    path = write_safetensors(tmp_path / "good.safetensors", {"a": entry(0, 8), "b": entry(8, 16)})
    container = open_container(path)
    assert set(container) == {"a", "b"}
    for name in container:
        assert torch.equal(container[name], torch.zeros(2))


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(0, 12), "b": entry(8, 16)}, ["b is at 8-16", "12-20"]),
        ({"a": entry(0, 8), "b": entry(0, 8), "c": entry(8, 16)}, ["8-16"]),
        ({"a": entry(0, 4), "b": entry(8, 16)}, ["b is at 8-16", "4-12"]),
        ({"a": entry(-8, 8, shape=[4]), "b": entry(8, 16)}, ["a is at -8-8", "0-16"]),
        ({"a": entry(0, 16, shape=[3])}, ["a is at 0-16", "0-12"]),
        ({"a": entry(0, 16, shape=[-4])}, ["safetensors"]),
        ({"a": entry(0, 16, shape=[2**40, 2**40])}, ["safetensors"]),
        ({"a": entry(0, 16, shape="four")}, ["safetensors"]),
        ({"a": entry(0, 8)}, ["bytes instead of"]),
        ({"a": entry(0, 32)}, ["bytes instead of"]),
        ({"a": entry(0, 16, shape=[32], dtype="F4")}, ["'a' is F4", "F64"]),
        ({"a": {"dtype": "F32"}}, ["data_offsets"]),
        ({"a": 5}, ["safetensors"]),
        ({"__metadata__": 5}, ["safetensors"]),
        ([], ["safetensors"]),
        (b"{'a': 1}", ["JSONDecodeError"]),
        (b"\xff\xfe", ["safetensors"]),
    ],
)
def test_a_header_that_is_wrong_is_refused(tmp_path, header, words):
    path = write_safetensors(tmp_path / "bad.safetensors", header)
    with refused(path, *words):
        read_all(path)


@pytest.mark.parametrize("length", [0, 5, 10**6, 2**62, 2**64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    path = write_safetensors(tmp_path / "length.safetensors", {"a": entry(0, 16)}, length=length)
    with refused(path):
        read_all(path)


@pytest.mark.parametrize(
    "name",
    [
        "../evil.safetensors",
        "/evil.safetensors",
        "sub/evil.safetensors",
        "..",
        "",
        5,
        "model.safetensors.index.json",
        "code.py",
    ],
)
def test_an_index_that_names_anything_but_a_weights_file_of_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(tensors(), place / "evil.safetensors")
    (folder / "code.py").write_text("")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with refused(index, repr(name)):
        read_all(index)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {"a": 1, "b": "x"}}'],
)
def test_a_damaged_index_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with refused(index, "index", "copy it again"):
        read_all(index)


def test_a_place_without_weights_offers_what_is_known(tmp_path):
    with refused(tmp_path, "folder", "student.safetensors"):
        read_all(tmp_path)
    with refused(tmp_path / "missing.safetensors", "is not a file"):
        read_all(tmp_path / "missing.safetensors")
    (tmp_path / "weights.npz").touch()
    with refused("weights.npz", "'.npz'", ".safetensors"):
        read_all(tmp_path / "weights.npz")
