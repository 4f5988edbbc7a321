"""Weights from the Hugging Face hub, served from a cache without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmae_ds.weights.hub import locate, locate_pretrained
from dmae_ds.weights.label import TEACHER
from tests.messages import refused
from tests.teacher.reference import IDS
from tests.teacher.references import IMAGES, assert_close, build_reference, features, load


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache folder of huggingface_hub, with the network switched off."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into_cache(hub: Path, owner: str, name: str, files: dict[str, Path | str]) -> Path:
    sha = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{owner}--{name}"
    snapshot = repository / "snapshots" / sha
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    for file, content in files.items():
        (snapshot / file).write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())
    return snapshot


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_a_hub_id_is_served_from_the_cache(tmp_path, hub, kind):
    reference = build_reference("hf-dinov2-registers")
    saved = tmp_path / "saved"
    saved.mkdir()
    if kind == "bin":
        torch.save(reference.tensors, saved / "pytorch_model.bin")
    else:
        reference.model.save_pretrained(saved, **({"max_shard_size": "40KB"} if kind == "sharded" else {}))
    snapshot = put_into_cache(hub, "facebook", "tiny-dino", {file.name: file for file in saved.iterdir()})
    path = locate("facebook/tiny-dino")
    assert path.parent == snapshot
    assert_close(features(load(reference, path), IDS), reference.features(IMAGES, IDS))


@pytest.mark.parametrize(
    "files, words",
    [
        (None, ["'owner/name'", "Cannot reach"]),
        ({"config.json": "{}"}, ["'owner/name'"]),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "absent.safetensors"}}'},
            ["hub"],
        ),
        (
            {"model.safetensors.index.json": '{"weight_map": {"a": "../../evil.safetensors"}}'},
            ["'../../evil.safetensors'"],
        ),
        ({"model.safetensors.index.json": "<html>"}, ["index"]),
    ],
)
def test_a_hub_id_that_can_not_be_fetched_is_refused(hub, files, words):
    if files is not None:
        put_into_cache(hub, "owner", "name", files)
    with refused("teacher.weights", *words):
        locate("owner/name", label=TEACHER)


def test_an_existing_path_is_not_taken_for_a_hub_id(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert locate("owner/name") == Path("owner/name")
    assert locate("weights/absent.pth") == Path("weights/absent.pth")


def test_pretrained_weights_are_those_of_timms_tag(hub):
    snapshot = put_into_cache(hub, "timm", "vit_base_patch16_224.mae", {"model.safetensors": "x"})
    assert locate_pretrained("vit_base_patch16_224.mae") == snapshot / "model.safetensors"
    with refused("teacher.name 'vit_base_patch16_224.mine'", "teacher.weights"):
        locate_pretrained("vit_base_patch16_224.mine", label=TEACHER)
