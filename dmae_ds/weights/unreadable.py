"""What a file or folder is that can't be read as weights, by its first bytes, and what to do with it."""

from __future__ import annotations

import zipfile
from pathlib import Path

from dmae_ds.output.safetensors_header import is_safetensors

_SAVE = "save its state dict with torch.save, or as .safetensors with safetensors.torch.save_file"
# (bytes, where they stand, what such a file is and what to do); the first that matches wins.
_SIGNATURES = (
    (b"version https://git-lfs", 0, "is a pointer of Git LFS, not the weights; fetch them with git lfs pull"),
    (b"\x1f\x8b", 0, "is compressed by gzip; unpack it with gunzip and give what comes out"),
    (b"BZh", 0, "is compressed by bzip2; unpack it with bunzip2 and give what comes out"),
    (b"\xfd7zXZ", 0, "is compressed by xz; unpack it with unxz and give what comes out"),
    (b"\x28\xb5\x2f\xfd", 0, "is compressed by zstd; unpack it with unzstd and give what comes out"),
    (b"\x89HDF", 0, f"is an HDF5 file of Keras; load it with transformers or Keras and {_SAVE}"),
    (b"GGUF", 0, f"is a GGUF file; load the original weights and {_SAVE}"),
    (b"\x93NUMPY", 0, f"is one array of NumPy, not a network; load the network and {_SAVE}"),
    (b"ustar", 257, "is a tar archive; unpack it with tar -xf and give the weights file in it"),
    (b"<", 0, "begins like a web page; download the weights file itself again"),
)
_START = 512  # bytes


def describe_unreadable(path: Path) -> str:
    """What is wrong with a file that is not safetensors, and what to do; empty where torch may read it."""
    with open(path, "rb") as file:
        start = file.read(_START)
    if not start.strip(b"\0"):
        return (
            f"ends in '{path.suffix}' and is empty, expected a .safetensors file or one of torch.save; copy "
            "it again"
        )
    for signature, offset, text in _SIGNATURES:
        if start[offset:].startswith(signature):
            return text
    if start.startswith(b"PK"):
        return _describe_zip(path)
    if start.startswith((b"{", b"[")):
        return "is a JSON file; give the weights file, or an index whose name ends in .index.json"
    if start.startswith(b"\x80") or path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        return ""  # a file of torch.save, of an old version or damaged
    return f"is not a file of torch.save or .safetensors, whatever its suffix '{path.suffix}'; {_SAVE}"


def _describe_zip(path: Path) -> str:
    """A reason where a zip archive is not of torch.save; empty where it is, or is cut off."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "is an archive of NumPy arrays (.npz), as Google published ViTs; let timm convert it: python -c "
            f"\"import timm; from safetensors.torch import save_file; save_file(timm.create_model('NAME', "
            f"checkpoint_path='{path.name}').state_dict(), 'new.safetensors')\""
        )
    inside = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return (
            'is a TorchScript program, not a file of weights; rewrite it: python -c "import torch; '
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'new.pth')\""
        )
    if "data.pkl" not in inside:
        return "is a zip archive without torch's data.pkl; unpack it and give the weights file in it"
    return ""


def describe_folder(path: Path, known: tuple[str, ...]) -> str:
    """What a folder without a known name of a weights file is, and which path to give."""
    if (path / "state.json").is_file() or any(path.glob("step-*")) or (path / "checkpoints").is_dir():
        near = [*path.resolve().parents[:2], *sorted(path.iterdir())]  # also the students of a family
        runs = [str(run) for run in near if (run / "student.safetensors").is_file()]
        advice = (
            f"give the run folder {' or '.join(runs)}, which holds"
            if runs
            else "give the run folder that holds"
        )
        return f"has the checkpoints of a training run; {advice} student.safetensors"
    if any(path.glob("*_model_states.pt")) or any(path.glob("*/*_model_states.pt")):
        return (
            "has a checkpoint of DeepSpeed's; write its weights into one file with the zero_to_fp32.py next "
            "to it, and give that file"
        )
    if any(path.glob("*.distcp")):
        return (
            "has a distributed checkpoint of torch; write it into one file, and give that: `python -m` "
            f"torch's distributed.checkpoint.format_utils dcp_to_torch {path} new.pth"
        )
    files = [file.name for file in sorted(path.iterdir()) if file.is_file() and _is_weights(file)]
    advice = f"give one of its files: {', '.join(files[:4])}" if files else "give the weights file itself"
    return f"is a folder with none of {', '.join(known)}; {advice}"


def _is_weights(path: Path) -> bool:
    if path.name.endswith(".index.json"):
        return True
    try:
        return is_safetensors(path) or (zipfile.is_zipfile(path) and not describe_unreadable(path))
    except (OSError, zipfile.BadZipFile):
        return False
