"""What tells weights files from others: it changes with their bytes, and not with files next to them."""

from __future__ import annotations

import json

from dmae_ds.weights.content import identify, identify_opened


def test_of_a_folder_only_the_opened_files_count(tmp_path):
    file, shard = tmp_path / "model.safetensors", tmp_path / "part-1.safetensors"
    file.write_bytes(b"weights")
    found = identify_opened(tmp_path)
    assert found == identify_opened(file) == identify(file) and found[0] == 7
    shard.write_bytes(b"a part")
    assert identify_opened(tmp_path) == found != identify(tmp_path)
    file.write_bytes(b"Weights")
    assert identify_opened(tmp_path) != found
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name, "b": shard.name, "c": "absent"}}))
    assert identify_opened(tmp_path) == identify_opened(index) == identify(shard)
    index.write_text("[]")
    assert identify_opened(index) == identify(index)
