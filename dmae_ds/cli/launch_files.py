"""`dmae-ds launch-files`: the launchers of a checkout's `launch/`, for an installed package (no torch).

setup.cfg installs them as `dmae_ds/shipped_launch`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.durable import write_atomically

_PACKAGE = Path(__file__).resolve().parents[1]
FILES = (
    "train.sh",
    "environment.sh",
    "checks.sh",
    "slurm.sbatch",
    "k8s-job.yaml",
    "accelerate.yaml",
    "hostfile.example",
    "Dockerfile",
    "Dockerfile.dockerignore",
    "constraints.txt",
)


def add_launch_files(subcommands) -> None:
    """Add `launch-files` to the root parser."""
    launch = subcommands.add_parser(
        "launch-files", help="write the launchers for several nodes, Slurm, Kubernetes and Docker"
    )
    launch.add_argument(
        "folder",
        metavar="DIR",
        help="they go to DIR/launch, and are started from DIR; files that differ are never overwritten",
    )
    launch.set_defaults(command=_launch_files)


def _launch_files(args: argparse.Namespace) -> None:
    for path in write_launch_files(Path(args.folder).expanduser()):
        print(path)


def write_launch_files(folder: Path) -> list[Path]:
    """Write all files to FOLDER/launch; returns their paths.

    Raises UserError, before anything is written, where one of these names is taken by something else.
    """
    source = launch_folder()
    contents = {folder / "launch" / name: (source / name).read_bytes() for name in FILES}
    taken = [path for path, content in contents.items() if _differs(path, content)]
    if taken:
        raise UserError(
            f"{', '.join(str(path) for path in taken)}: found, and not the file that is shipped; "
            "nothing was written: choose another DIR, or rename what is there"
        )
    try:
        (folder / "launch").mkdir(parents=True, exist_ok=True)
        for path, content in contents.items():
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f"'{folder / 'launch'}' cannot be written ({error}); choose another DIR") from None
    return list(contents)


def launch_folder() -> Path:
    """The folder of the shipped launchers, of an installed package or of a checkout."""
    installed = _PACKAGE / "shipped_launch"
    return installed if installed.is_dir() else _PACKAGE.parent / "launch"


def _differs(path: Path, content: bytes) -> bool:
    if path.is_file():
        return path.read_bytes() != content
    return path.exists() or path.is_symlink()
