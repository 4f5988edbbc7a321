"""`dmae-ds checkpoint`: a run with a damaged checkpoint and an interrupted save."""

from __future__ import annotations

import shutil

import pytest

from dmae_ds.cli.main import main
from dmae_ds.train.checkpoint.folder import MUST_AGREE, CheckpointFolder, Written, crc32_of

IDENTITY = {
    **dict.fromkeys(MUST_AGREE, 1),
    "world_size": 2,
    "zero_stage": 3,
    "precision": "fp32",
    "num_samples": 64,
    "seconds": 0.5,
}


@pytest.fixture
def run(tmp_path):
    """A run folder of three checkpoints, the middle one with a wrong byte, and what a killed save left."""
    folder = CheckpointFolder(tmp_path / "run")
    for step in (5, 10, 15, 20):
        folder.begin(step)
        files = {}
        for rank in range(2):
            path = folder.path / folder.tag(step) / f"part-{rank}.pt"
            path.write_bytes(b"x" * 1024)
            files[path.name] = Written(1024, crc32_of(path))
        if step < 20:
            folder.commit(step, {"step": step, "position": 16 * step, **IDENTITY}, files)
    (folder.path / folder.tag(10) / "part-1.pt").write_bytes(b"x" * 1023 + b"y")
    return folder.run_dir


def test_inspect_is_a_table_of_every_checkpoint(run, capsys):
    assert main(["checkpoint", "inspect", str(run)]) == 0
    _, heads, *rows = capsys.readouterr().out.splitlines()
    names = ["checkpoint", "step", "position", "epoch", "ranks", "ZeRO", "precision", "MiB"]
    assert heads.split()[:8] == names
    assert rows[0].split()[:7] == ["step-00000005", "5", "80", "1.25", "2", "3", "fp32"]
    assert rows[2].endswith("latest") and not rows[1].endswith("latest")
    assert "state.json" in rows[3] and len(rows) == 4


def test_verify_reads_every_byte_and_names_all_that_is_wrong(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000010: part-1.pt" in line and "step-00000020: " in line
    assert "step-00000010: part-0.pt" not in line
    assert main(["checkpoint", "verify", str(run / "checkpoints" / "step-00000015")]) == 0
    output = capsys.readouterr().out
    assert "step-00000015" in output and "2 files" in output


def test_a_copied_checkpoint_is_checked_where_it_is(run, tmp_path, capsys):
    shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "kept" / "step-00000005")
    assert main(["checkpoint", "verify", str(tmp_path / "kept" / "step-00000005")]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "nothing")]) == 2
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 2
    not_found, none = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "nothing") in not_found and f"{tmp_path}/step-*" in none.replace("/checkpoints", "")


def test_a_damaged_checkpoint_is_not_converted(run, tmp_path, capsys):
    checkpoint, out = run / "checkpoints" / "step-00000010", tmp_path / "out"
    assert main(["checkpoint", "convert", str(checkpoint), str(out)]) == 2
    assert "part-1.pt" in capsys.readouterr().err and not out.exists()
