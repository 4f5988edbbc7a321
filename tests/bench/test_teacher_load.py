"""`dmae-ds bench teacher-load` measures correctly, and a cut teacher costs its own bytes and no more."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.bench import teacher_load
from dmae_ds.bench.measure import Load
from dmae_ds.bench.random_files import mae_shapes, make_files, num_bytes
from dmae_ds.bench.teacher_load import MAX_PEAK, MAX_READ, PEAK_CONSTANT, table, verdicts
from dmae_ds.cli.main import main

MIB = 1 << 20
ROUNDING = 0.1  # MiB, of the figures in the table
COLUMNS = ("needed", "read", "disk", "kept", "peak", "load", "floor")


def run_bench(tmp_path, *options: str) -> str:
    """What the command prints, in a process whose temporary folders are made in tmp_path; none is left."""
    command = [sys.executable, "-m", "dmae_ds", "bench", "teacher-load", *options]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert not list(tmp_path.iterdir())
    return done.stdout


def rows_of(printed: str) -> dict[tuple[str, int, int], dict[str, float]]:
    """{(container, P, stage): {"needed", "read", "disk", "kept", "peak": MiB, "load", "floor": seconds}}."""
    rows = {}
    for words in (line.split() for line in printed.splitlines() if line.startswith(".")):
        if words[2] != "worst":
            numbers = map(float, words[4:11])
            rows[words[0], int(words[1]), int(words[2])] = dict(zip(COLUMNS, numbers, strict=True))
    return rows


def check_limits(printed: str, *, lengths: list[int], block: int, embedding: int, last_block: int) -> None:
    """Check that every stage has a row, needs exactly its blocks and the embedding, and costs little more.

    block, embedding: entries of one block, and of the patch projection, CLS and the position codes
    """
    rows = rows_of(printed)
    assert set(rows) == {
        (file, length, stage)
        for file in (".pth", ".safetensors")
        for length in lengths
        for stage in range(1, length + 1)
    }
    for (_, length, stage), row in rows.items():
        # Two stages both hold a block that the border between them cuts.
        num_blocks = -(-stage * last_block // length) - (stage - 1) * last_block // length
        assert row["needed"] == pytest.approx(4 * (num_blocks * block + embedding) / MIB, abs=ROUNDING)
        assert row["kept"] == row["needed"]
        assert row["needed"] - ROUNDING <= row["read"] <= MAX_READ * row["needed"] + ROUNDING
        assert 0.9 * row["kept"] <= row["peak"] <= MAX_PEAK * row["kept"] + PEAK_CONSTANT / MIB + ROUNDING
    assert "bytes read within 2% of needed: yes" in printed
    assert "peak within 10% of kept plus 64 MiB: yes" in printed


def test_a_stage_of_a_base_teacher_reads_and_holds_its_own_bytes(tmp_path):
    printed = run_bench(tmp_path, "--name", "vit_base_patch16_224", "--stages", "2")
    # A block: qkv, projection, two MLP matrices = 12 D^2; their biases 9 D; two norms 4 D.
    check_limits(
        printed,
        lengths=[2],
        block=12 * 768**2 + 13 * 768,
        embedding=(3 * 16**2 + 1 + 1 + 197) * 768,
        last_block=9,
    )


@pytest.mark.slow
def test_a_stage_of_a_huge_teacher_reads_and_holds_its_own_bytes(tmp_path):
    printed = run_bench(tmp_path)
    print(f"\n{printed}")
    check_limits(
        printed,
        lengths=[1, 2, 4],
        block=12 * 1280**2 + 13 * 1280,
        embedding=(3 * 14**2 + 1 + 1 + 257) * 1280,
        last_block=24,
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--name", "vit_bas_patch16_224"], ["vit_bas_patch16_224", "timm"]),
        (["--name", "resnet18"], ["resnet18"]),
        (["--last-block", "0"], ["--last-block 0", "vit_tiny_patch16_224", "1 to 12"]),
        (["--last-block", "13"], ["--last-block 13", "1 to 12"]),
        (["--stages", "1", "10"], ["9 blocks", "10 stages"]),
        (["--stages", "0"], ["9 blocks", "0 stages"]),
        (["--folder", "{tmp_path}/file/folder"], ["--folder", "file/folder"]),
    ],
)
def test_bad_input_is_one_line_and_makes_no_file(tmp_path, capsys, options, words):
    (tmp_path / "file").touch()
    options = [
        option.format(tmp_path=tmp_path)
        for option in ["--name", "vit_tiny_patch16_224", "--folder", "{tmp_path}/here", *options]
    ]
    assert main(["bench", "teacher-load", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("dmae-ds: error: ") and printed.err.count("\n") == 1
    assert [word for word in words if word not in printed.err] == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_off_linux_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main(["bench", "teacher-load"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Linux" in line


def test_a_measurement_that_fails_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(teacher_load, "make_files", lambda folder, name, shapes: [folder / "teacher.pth"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["bench", "teacher-load", "--name", "vit_tiny_patch16_224"]) == 1
    error = capsys.readouterr().err
    assert "blocks 1-9" in error and "exit code 1" in error and error.count("\n") == 1


def test_files_are_made_once_and_again_where_they_are_incomplete(tmp_path):
    shapes = {"cls_token": (1, 1, 8), "blocks.0.norm1.weight": (8,), "blocks.0.attn.qkv.weight": (24, 8)}
    pth, safetensors = make_files(tmp_path, "module:vit/x", shapes)
    assert {path.parent for path in (pth, safetensors)} == {tmp_path} and len(list(tmp_path.iterdir())) == 2
    first = load_file(safetensors)
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes
    assert sum(tensor.nbytes for tensor in first.values()) == num_bytes(shapes)
    assert all(tensor.std() > 0 for tensor in first.values())
    same = torch.load(pth, weights_only=True)["model"]
    assert list(same) == list(shapes) and all(torch.equal(same[name], first[name]) for name in shapes)

    made = [path.stat().st_ino for path in (pth, safetensors)]
    assert make_files(tmp_path, "module:vit/x", shapes) == [pth, safetensors]
    assert [path.stat().st_ino for path in (pth, safetensors)] == made
    for path in (pth, safetensors):
        path.write_bytes(path.read_bytes()[:-100])
    make_files(tmp_path, "module:vit/x", shapes)
    again = torch.load(pth, weights_only=True)["model"]
    assert all(torch.equal(load_file(safetensors)[name], again[name]) for name in shapes)
    make_files(tmp_path, "module:vit/x", {"cls_token": (1, 1, 9)})
    assert load_file(safetensors)["cls_token"].shape == (1, 1, 9)
    assert torch.load(pth, weights_only=True)["model"]["cls_token"].shape == (1, 1, 9)


# Bytes of space beyond the tensors; a .pth needs more.
@pytest.mark.parametrize("room, left", [(-1000, []), (300, ["random-mae-vit.safetensors"])])
def test_a_full_disk_is_an_os_error_and_leaves_no_incomplete_file(tmp_path, room, left):
    shapes = {"cls_token": (1, 1, 50_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes(shapes) + room, limits[1]))
    try:
        with pytest.raises(OSError):
            make_files(tmp_path, "vit", shapes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == left


def test_a_random_file_has_the_published_mae_s_names_and_size():
    shapes = mae_shapes("vit_base_patch16_224")
    # mae_vit_base_patch16 with its decoder and its fixed position codes.
    assert num_bytes(shapes) == 4 * 111_907_840
    assert shapes["decoder_blocks.7.attn.qkv.weight"] == (1536, 512)
    assert "decoder_blocks.8.norm1.weight" not in shapes
    assert shapes["decoder_pos_embed"] == (1, 197, 512) and shapes["decoder_pred.weight"] == (768, 512)


def load_of(**changes) -> Load:
    sizes = {
        "needed": 1000 * MIB,
        "read": 1000 * MIB,
        "disk": 1000 * MIB,
        "kept": 500 * MIB,
        "peak": 500 * MIB,
    }
    seconds = {"load_s": 2.0, "floor_s": 1.0, "floor_disk": 1000 * MIB}
    return Load(**(sizes | seconds | changes))


def test_a_limit_that_is_exceeded_is_named_with_its_stage():
    kept = {(".pth", 2, 1, "1-5"): load_of(), (".pth", 2, 2, "6-9"): load_of(read=1020 * MIB, peak=614 * MIB)}
    read, peak = verdicts(kept).splitlines()
    assert "yes" in read and "1.0200" in read and "(.pth, P 2, stage 2)" in read
    assert "yes" in peak and "614 MiB for 500" in peak and "(.pth, P 2, stage 2)" in peak
    broken = {**kept, (".safetensors", 1, 1, "1-9"): load_of(read=1021 * MIB, peak=615 * MIB)}
    read, peak = verdicts(broken).splitlines()
    assert "NO" in read and "1.0210" in read and "(.safetensors, P 1, stage 1)" in read
    assert "NO" in peak and "615 MiB for 500" in peak


def test_a_file_that_stayed_in_the_page_cache_is_reported():
    cold, warm = {(".pth", 1, 1, "1-9"): load_of()}, {(".pth", 2, 1, "1-5"): load_of(floor_disk=0)}
    assert "page cache" not in verdicts(cold)
    assert "page cache" in verdicts(cold | warm)


def test_the_table_ends_with_the_worst_of_every_ratio():
    loads = {
        (".pth", 2, 1, "1-5"): load_of(read=1010 * MIB, load_s=3.0),
        (".pth", 2, 2, "6-9"): load_of(disk=1100 * MIB, peak=550 * MIB),
    }
    lines = table(loads).splitlines()
    sizes = ["1000.0", "1010.0", "1000.0", "500.0", "500.0", "3.00", "1.00"]
    assert lines[2].split() == [".pth", "2", "1", "1-5", *sizes, "1.010", "1.000", "1.000", "3.000"]
    assert lines[-1].split() == [".pth", "2", "worst", "1.010", "1.100", "1.100", "3.000"]
    assert len({len(line) for line in lines[2:]} | {len(lines[0])}) == 1
