"""Files of tensors: equal content is an equal file."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dmae_ds.output.durable import write_tensors


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    """Of 8 names there are 40,320 orders, so that two files would almost never agree by chance."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    metadata = {f"name{number}": f'{{"é": "{number}\\n"}}' for number in range(8)}
    for number in range(3):
        write_tensors(tmp_path / str(number), tensors, dict(sorted(metadata.items(), reverse=number == 1)))
    first, *others = [(tmp_path / str(number)).read_bytes() for number in range(3)]
    assert all(other == first for other in others)
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
    loaded = load_file(tmp_path / "0")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    write_tensors(tmp_path / "plain", tensors)
    assert load_file(tmp_path / "plain").keys() == tensors.keys()
