"""Weights files: every tensor read back as it was saved, its bytes and no others; a file that can't be trusted is one line."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.errors import UserError
from dmae_ds.weights.containers import IN_A_FOLDER, open_container
from dmae_ds.weights.label import TEACHER


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("a", (5, 7)), ("b", (3,)), ("c", (2, 2, 4)))
    }


def refusal(path: Path, **keys) -> str:
    """The one line with which this file is refused, opened and read whole."""
    with pytest.raises(UserError) as caught:
        container = open_container(path, **keys)
        for name in container:
            container[name]
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def assert_same(container, expected: dict[str, torch.Tensor]) -> None:
    assert set(container) == set(expected)
    for name, tensor in expected.items():
        found = container[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert (container.like(name).dtype, container.like(name).shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor.detach()), name


def odd_tensors() -> dict[str, torch.Tensor]:
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


def test_a_read_tensor_is_a_copy_of_its_own(tmp_path):
    torch.save(tensors(), tmp_path / "a.pth")
    container = open_container(tmp_path / "a.pth")
    container["a"].zero_()
    assert_same(container, tensors())


@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=1e-3, ema=torch.randn(9)),
        {"state": {0: {"exp_avg": torch.randn(4)}}},
        [torch.randn(2), {1, 2}],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_lies_beside_the_weights_moves_no_tensor(tmp_path, beside, first):
    checkpoint = {"args": beside, "model": tensors()} if first else {"model": tensors(), "args": beside}
    torch.save(checkpoint | {"epoch": 3}, tmp_path / "nested.pth")
    assert_same(open_container(tmp_path / "nested.pth", ("teacher", "model")), tensors())


def test_the_first_entry_that_is_there_wins(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "ema": tensors()}, tmp_path / "two.pth")
    assert_same(open_container(tmp_path / "two.pth", ("ema", "model")), tensors())
    torch.save(tensors(), tmp_path / "plain.pth")
    assert_same(open_container(tmp_path / "plain.pth", ("ema", "model")), tensors())


def save_sharded(folder: Path, kind: str) -> Path:
    """`a` and `c` in one part, `b` in the other, with an index."""
    stem, suffix, save = (
        ("model", ".safetensors", save_file)
        if kind == "safetensors"
        else ("pytorch_model", ".bin", torch.save)
    )
    parts = {f"{stem}-00001-of-00002{suffix}": ("a", "c"), f"{stem}-00002-of-00002{suffix}": ("b",)}
    for part, names in parts.items():
        save({name: tensors()[name] for name in names}, folder / part)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {name: part for part, names in parts.items() for name in names}}
        )
    )
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_parts_are_read_as_one_file_by_their_index_or_their_folder(tmp_path, kind):
    index = save_sharded(tmp_path, kind)
    assert_same(open_container(index), tensors())
    assert_same(open_container(tmp_path), tensors())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_part_is_told_and_the_others_are_read(tmp_path, kind):
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
    """What the kernel counted of read calls; pages of a mapped file would not be in it, so values are compared too."""
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count a process's reads")
    return int(counter.read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_the_bytes_of_the_asked_tensors_are_read_and_no_others(tmp_path, kind):
    path = tmp_path / f"large.{kind}"
    large = {
        f"blocks.{number}.weight": torch.full((256, 1024), float(number)) for number in range(12)
    }  # 1 MiB each
    (save_file if kind == "safetensors" else torch.save)(large, path)
    bytes_read_by_this_process()
    before = bytes_read_by_this_process()
    container = open_container(path)
    assert "blocks.5.weight" in container and set(large) == container.keys()  # names alone cost nothing
    opened = bytes_read_by_this_process()
    found = {name: container[name] for name in ("blocks.3.weight", "blocks.7.weight")}
    read = bytes_read_by_this_process() - opened
    assert all(torch.equal(tensor, large[name]) for name, tensor in found.items())
    assert opened - before < 100_000  # the header, or the zip's directory and the pickle of names
    assert 2 << 20 <= read < (2 << 20) + 10_000
    assert container.bytes_read == 2 << 20


def test_a_slice_costs_its_own_bytes(tmp_path):
    torch.save({"rows": torch.arange(1000.0).reshape(100, 10)[50:52]}, tmp_path / "slice.pth")
    container = open_container(tmp_path / "slice.pth")
    assert torch.equal(container["rows"], torch.arange(500.0, 520.0).reshape(2, 10))
    assert container.bytes_read == 80


def test_a_mapped_file_is_let_go_when_it_is_open(tmp_path):
    torch.save(tensors(), tmp_path / "mapped.pth")
    container = open_container(tmp_path / "mapped.pth")
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list a process's maps")
    assert "mapped.pth" not in Path("/proc/self/maps").read_text()
    assert len(container) == 3


# Where a file is cut: in the header, right after it, inside a tensor, before the last byte.
@pytest.mark.parametrize("kept", [0, 4, 60, 0.3, 0.7, -100, -1])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_truncated_file_is_refused(tmp_path, kind, kept):
    path = tmp_path / f"whole.{kind}"
    (save_file if kind == "safetensors" else torch.save)(tensors(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "copy it again" in refusal(path)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "whole.safetensors"
    save_file(tensors(), path)
    container = open_container(path)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match="inside a tensor; copy it again"):
        [container[name] for name in container]


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": tensors(), "args": Touch(marker)}, tmp_path / "evil.pth")
    words = refusal(tmp_path / "evil.pth", entries=("model",))
    assert "nothing in it was run" in words and "system" in words and "safetensors" in words
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Touch(marker)))
    refusal(tmp_path / "plain.pth")
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes())  # the proof that it would have
    assert marker.exists()


def test_a_file_older_than_the_zip_format_is_refused(tmp_path):
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "older than torch 1.6" in refusal(tmp_path / "old.pth")


def damage_directory(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x01\x02", b"PK\x07\x07"))


def damage_end(path: Path) -> None:
    """The 64-bit end record says that it lies on another disk."""
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
def test_a_damaged_or_packed_pth_is_refused(tmp_path, damage):
    path = tmp_path / "damaged.pth"
    torch.save(tensors(), path)
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    refusal(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.randn(3, dtype=torch.complex64).conj()],
    ids=["sparse", "meta", "conjugated"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_tensor_without_plain_bytes_is_named(tmp_path, tensor):
    torch.save(tensors() | {"odd": tensor}, tmp_path / "odd.pth")
    assert "'odd'" in refusal(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        ({}, "holds nothing"),
        ([torch.ones(1)], "holds list"),
        (
            {"epoch": 3, "weights": {"a": torch.ones(1)}},
            "holds epoch, weights, expected an entry 'model' or a plain dict of tensors",
        ),
        ({"model": {"a": "text"}}, "holds model"),
        ({1: torch.ones(1)}, "holds 1"),
    ],
)
def test_a_pth_without_weights_says_what_it_holds(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pth")
    assert words in refusal(tmp_path / "other.pth", entries=("model",))


def test_an_entry_of_another_format_names_that_format(tmp_path):
    torch.save({"model": tensors()}, tmp_path / "mae.pth")
    assert "try teacher.format=mae" in refusal(
        tmp_path / "mae.pth",
        entries=("state_dict",),
        formats={"state_dict": ["timm"], "model": ["mae"]},
        label=TEACHER,
    )


def write_safetensors(path: Path, header: object, *, data: int = 16, length: int | None = None) -> Path:
    """A file with exactly this header; `length` is what it says of the header's size."""
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
    container = open_container(
        write_safetensors(tmp_path / "good.safetensors", {"a": entry(0, 8), "b": entry(8, 16)})
    )
    assert_same(container, {"a": torch.zeros(2), "b": torch.zeros(2)})


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(0, 12), "b": entry(8, 16)}, "b is at 8-16 instead of 12-20"),
        ({"a": entry(0, 8), "b": entry(0, 8), "c": entry(8, 16)}, "instead of 8-16"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "b is at 8-16 instead of 4-12"),
        ({"a": entry(-8, 8, shape=[4]), "b": entry(8, 16)}, "a is at -8-8 instead of 0-16"),
        ({"a": entry(0, 16, shape=[3])}, "a is at 0-16 instead of 0-12"),
        ({"a": entry(0, 16, shape=[-4])}, "not a complete safetensors file"),
        ({"a": entry(0, 16, shape=[2**40, 2**40])}, "not a complete safetensors file"),
        ({"a": entry(0, 16, shape="four")}, "not a complete safetensors file"),
        ({"a": entry(0, 8)}, "bytes instead of"),
        ({"a": entry(0, 32)}, "bytes instead of"),
        ({"a": entry(0, 16, shape=[32], dtype="F4")}, "a is F4, known are F64"),
        ({"a": {"dtype": "F32"}}, "data_offsets"),
        ({"a": 5}, "not a complete safetensors file"),
        ({"__metadata__": 5}, "not a complete safetensors file"),
        ([], "not a complete safetensors file"),
        (b"{'a': 1}", "JSONDecodeError"),
        (b"\xff\xfe", "not a complete safetensors file"),
    ],
)
def test_a_header_that_is_wrong_is_refused(tmp_path, header, words):
    assert words in refusal(write_safetensors(tmp_path / "bad.safetensors", header))


@pytest.mark.parametrize("length", [0, 5, 10**6, 2**62, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    refusal(write_safetensors(tmp_path / "lie.safetensors", {"a": entry(0, 16)}, length=length))


@pytest.mark.parametrize(
    "part",
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
def test_an_index_that_names_anything_but_a_neighbour_is_refused(tmp_path, part):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(tensors(), place / "evil.safetensors")
    (folder / "code.py").write_text("")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": part}}))
    assert f"names the file {part!r}" in refusal(index)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"weight_map": {"a": 1, "b": "x"}}'],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "is not an index of weights files" in refusal(tmp_path / "model.safetensors.index.json")


def test_a_place_without_weights_says_what_would_be_known(tmp_path):
    assert "folder with none of student.safetensors" in refusal(tmp_path)
    assert "is not a file" in refusal(tmp_path / "missing.safetensors")
    (tmp_path / "weights.npz").touch()
    assert "ends in '.npz'; known are .safetensors" in refusal(tmp_path / "weights.npz")
