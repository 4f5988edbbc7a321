"""Weights files: every tensor is read back as it was saved, and no other bytes are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.weights.containers import IN_A_FOLDER, open_container
from tests.weights.files import tensors


def assert_same(container, expected: dict[str, torch.Tensor]) -> None:
    """Names, shapes, dtypes and values are those that were saved."""
    assert set(container) == set(expected)
    for name, tensor in expected.items():
        read = container[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert (container.like(name).dtype, container.like(name).shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor.detach()), name


def odd_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and layout that a file may hold."""
    whole = torch.arange(60.0).reshape(3, 4, 5)
    return {
        "empty": torch.empty(0, 3),  # first: its record begins where the next one's padding does
        "whole": whole,
        "transposed": whole.transpose(0, 2),
        "sliced": whole[1:, 1:3, ::2],
        "expanded": whole[:1, :1].expand(3, 4, 5),
        "parameter": torch.nn.Parameter(whole[0] + 1),
        "scalar": torch.tensor(3.5),
        "bf16": whole.bfloat16(),
        "half": whole.half()[1],
        "double": whole.double(),
        "int64": whole.long(),
        "int8": whole.to(torch.int8),
        "bool": whole > 30,
        "large": torch.arange(300_000.0)[1:],
    }


def test_every_kind_of_tensor_is_read_back_equal_from_a_pth(tmp_path):
    torch.save(odd_tensors(), tmp_path / "odd.pth")
    assert_same(open_container(tmp_path / "odd.pth"), odd_tensors())


def test_every_kind_of_tensor_is_read_back_equal_from_safetensors(tmp_path):
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in odd_tensors().items()}
    save_file(contiguous, tmp_path / "odd.safetensors", metadata={"by": "us"})
    container = open_container(tmp_path / "odd.safetensors")
    assert_same(container, contiguous)
    assert container.metadata == {"by": "us"}


def test_changing_a_tensor_that_was_read_leaves_the_file_as_it_is(tmp_path):
    torch.save(tensors(), tmp_path / "a.pth")
    container = open_container(tmp_path / "a.pth")
    container["a"].zero_()
    assert_same(container, tensors())


@pytest.mark.parametrize(
    "other",
    [
        argparse.Namespace(lr=1e-3, ema=torch.randn(9)),
        {"state": {0: {"exp_avg": torch.randn(4)}}},
        [torch.randn(2), {1, 2}],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_entries_of_a_checkpoint_move_no_tensor(tmp_path, other, first):
    checkpoint = {"args": other, "model": tensors()} if first else {"model": tensors(), "args": other}
    torch.save(checkpoint | {"epoch": 3}, tmp_path / "nested.pth")
    assert_same(open_container(tmp_path / "nested.pth", ("teacher", "model")), tensors())


def test_the_first_entry_that_is_there_wins(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": tensors()}, tmp_path / "two.pth")
    assert_same(open_container(tmp_path / "two.pth", ("ema", "model")), tensors())
    torch.save(tensors(), tmp_path / "plain.pth")
    assert_same(open_container(tmp_path / "plain.pth", ("ema", "model")), tensors())


def save_sharded(folder: Path, kind: str) -> Path:
    """Save `a` and `c` in one file, `b` in another, with an index."""
    stem, save = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    names_of = {f"{stem}-00001-of-00002.{kind}": ("a", "c"), f"{stem}-00002-of-00002.{kind}": ("b",)}
    for file, names in names_of.items():
        save({name: tensors()[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in names_of.items() for name in names}
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_several_files_are_read_as_one_by_their_index_or_their_folder(tmp_path, kind):
    index = save_sharded(tmp_path, kind)
    assert_same(open_container(index), tensors())
    assert_same(open_container(tmp_path), tensors())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_file_of_an_index_is_named_and_the_others_are_read(tmp_path, kind):
    index = save_sharded(tmp_path, kind)
    (missing,) = tmp_path.glob("*-00002-of-00002*")
    missing.unlink()
    container = open_container(index)
    assert container.absent == [missing.name]
    assert_same(container, {name: tensors()[name] for name in ("a", "c")})


@pytest.mark.parametrize("name", [name for name in IN_A_FOLDER if not name.endswith(".index.json")])
def test_a_folder_is_its_weights_file(tmp_path, name):
    (save_file if name.endswith(".safetensors") else torch.save)(tensors(), tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert open_container(tmp_path).path == tmp_path / name
    assert_same(open_container(tmp_path), tensors())


def bytes_read_by_this_process() -> int:
    """Bytes that this process has read, as the kernel counts them.

    Pages of a mapped file are not counted, so values are compared too.
    """
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count a process's reads")
    return int(counter.read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_the_bytes_of_the_asked_tensors_are_read_and_no_others(tmp_path, kind):
    path = tmp_path / f"large.{kind}"
    # 1 MiB each.
    large = {f"blocks.{number}.weight": torch.full((256, 1024), float(number)) for number in range(12)}
    (save_file if kind == "safetensors" else torch.save)(large, path)
    bytes_read_by_this_process()
    before = bytes_read_by_this_process()
    container = open_container(path)
    assert "blocks.5.weight" in container and set(large) == container.keys()  # names alone cost nothing
    opened = bytes_read_by_this_process()
    asked = {name: container[name] for name in ("blocks.3.weight", "blocks.7.weight")}
    read = bytes_read_by_this_process() - opened
    assert all(torch.equal(tensor, large[name]) for name, tensor in asked.items())
    assert opened - before < 100_000  # the header, or the zip's directory and the pickle of names
    assert 2 << 20 <= read < (2 << 20) + 10_000
    assert container.bytes_read == 2 << 20


def test_a_slice_of_a_tensor_reads_its_own_bytes(tmp_path):
    torch.save({"rows": torch.arange(1000.0).reshape(100, 10)[50:52]}, tmp_path / "slice.pth")
    container = open_container(tmp_path / "slice.pth")
    assert torch.equal(container["rows"], torch.arange(500.0, 520.0).reshape(2, 10))
    assert container.bytes_read == 80


def test_a_file_is_no_longer_mapped_once_it_is_open(tmp_path):
    torch.save(tensors(), tmp_path / "mapped.pth")
    container = open_container(tmp_path / "mapped.pth")
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list a process's maps")
    assert "mapped.pth" not in Path("/proc/self/maps").read_text()
    assert len(container) == 3
