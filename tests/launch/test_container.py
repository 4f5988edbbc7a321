"""The image and the Kubernetes file, as far as they can be checked without Docker; `dmae-ds launch-files`."""

from __future__ import annotations

import configparser
import fnmatch
import re
import shlex
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dmae_ds.cli.launch_files import FILES, write_launch_files
from dmae_ds.cli.main import main
from tests.messages import refused

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = REPOSITORY / "launch"
IN_THE_IMAGE = ("install", "remote", "wandb", "export")


def instructions() -> list[tuple[str, list[str]]]:
    """(instruction, its words) of every line of the Dockerfile."""
    lines = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(words[0], words[1:]) for line in joined.splitlines() if (words := shlex.split(line))]


def requirements() -> dict[str, list[Requirement]]:
    """What the package requires, and each extra, as setup.cfg has it."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    groups = {"install": config["options"]["install_requires"], **config["options.extras_require"]}
    return {name: [Requirement(line) for line in text.split("\n") if line] for name, text in groups.items()}


def test_what_is_copied_exists_and_is_in_the_context():
    sources = [word for name, words in instructions() if name == "COPY" for word in words[:-1]]
    assert len(sources) > 6
    patterns = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    assert "*" in patterns and set(sources) == set(kept)
    assert not [source for source in sources if not (REPOSITORY / source).exists()]
    # What setup.cfg takes the package from.
    packages = {path.name for path in REPOSITORY.iterdir() if path.is_dir() and path.name in sources}
    assert packages == {"launch", "ds_configs", "data_prep", "dmae_ds"}


def test_the_container_s_user_is_a_number_that_kubernetes_runs_it_as():
    (number,) = [words[0].partition("=")[2] for name, words in instructions() if words[0].startswith("UID=")]
    last_user = [words for name, words in instructions() if name == "USER"][-1]
    after = [name for name, _ in instructions()][-1]
    assert last_user == ["$UID"] and int(number) > 0 and after == "CMD"
    _, job = yaml.safe_load_all((LAUNCH / "k8s-job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(number)
    (workdir,) = [words[0] for name, words in instructions() if name == "WORKDIR"]
    copied = [words for name, words in instructions() if name == "COPY" and words[:-1] == ["launch"]]
    # `bash launch/train.sh` of the container's command is found in the working directory.
    assert copied == [["launch", "launch"]] and workdir.startswith("/")
    assert "launch/train.sh" in pod["containers"][0]["command"][2]
    assert not pod["containers"][0]["image"].endswith(("latest", "dmae-ds"))


def test_every_requirement_of_the_image_is_pinned_to_a_version_that_it_allows():
    lines = [line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines) > 100 and all(name == canonicalize_name(name) for name in pinned)
    groups = requirements()
    assert set(IN_THE_IMAGE) <= set(groups)
    bad = [
        f"{requirement} but {pinned.get(canonicalize_name(requirement.name))}"
        for group in IN_THE_IMAGE
        for requirement in groups[group]
        if not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"))
    ]
    assert not bad
    extras = re.search(r"ARG EXTRAS=(\S+)", (LAUNCH / "Dockerfile").read_text())[1]
    assert set(extras.split(",")) <= set(IN_THE_IMAGE)
    base = dict(instructions())["FROM"][0]
    assert fnmatch.fnmatch(base, "*:*.*.*-devel-*")


def test_launch_files_are_written_once_and_never_over_others(tmp_path, capsys):
    assert main(["launch-files", str(tmp_path / "new")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in written] == list(FILES)
    assert all(path.read_bytes() == (LAUNCH / path.name).read_bytes() for path in written)
    assert {path.name for path in (tmp_path / "new" / "launch").iterdir()} == set(FILES)
    assert write_launch_files(tmp_path / "new") == written  # equal files are no reason to refuse
    changed, missing = written[2], written[0]
    changed.write_text("#SBATCH --partition=mine\n")
    missing.unlink()
    assert main(["launch-files", str(tmp_path / "new")]) == 2
    assert str(changed) in capsys.readouterr().err
    assert changed.read_text() == "#SBATCH --partition=mine\n" and not missing.exists()
    (tmp_path / "file").write_text("")
    with refused(str(tmp_path / "file"), "DIR"):
        write_launch_files(tmp_path / "file")


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".sh", ".sbatch", ".yaml"))])
def test_a_shipped_file_needs_no_file_that_is_not_shipped(name):
    text = (LAUNCH / name).read_text()
    named = set(re.findall(r"(?<![\w/])launch/([\w.-]*\w)", text))
    named |= set(re.findall(r'^\. .*/([\w.]+)"?$', text, flags=re.MULTILINE))
    assert named <= set(FILES)
