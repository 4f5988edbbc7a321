"""Images of other channels and depths: .npy arrays are decoded, cropped and refused by their numbers."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch

from dmae_ds.data.arrays import channels_in, decode_array, describe_array, read_array_header
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.decode import decode, decode_bytes
from dmae_ds.data.loader import eval_batches, train_batches
from dmae_ds.data.pixels import PixelFormat
from dmae_ds.data.reader import CorruptSample, Sample
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import NewSample, ShardError, write_manifest, write_shard
from tests.messages import refused


def npy(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 4), (5, 7, 13)])
def test_values_are_those_of_the_file_in_8_and_16_bits(dtype, shape):
    top = 2 ** (8 * np.dtype(dtype).itemsize)
    values = np.random.default_rng(0).integers(0, top, shape).astype(dtype)
    header, channels = read_array_header(npy(values)), shape[2] if len(shape) == 3 else 1
    assert (header.height, header.width, header.channels) == (5, 7, channels)
    assert channels_in(describe_array(header)) == channels and channels_in("original") is None
    expected = values.astype(np.float64).reshape(5, 7, channels) * 255 / (top - 1)
    wide = decode_array(npy(values), bits=16)
    assert wide.dtype == np.float32 and np.allclose(wide, expected, atol=1e-4)
    narrow = decode_array(npy(values), bits=8)
    assert narrow.dtype == np.uint8
    assert np.array_equal(narrow.squeeze(), (values >> 8 if top > 256 else values).squeeze())


@pytest.mark.parametrize(
    "data, word",
    [
        (npy(np.zeros((4, 4, 3), np.float32)), "float32"),
        (npy(np.zeros((2, 4, 4, 3), np.uint8)), "[2, 4, 4, 3]"),
        (npy(np.zeros((4, 0, 3), np.uint8)), "[4, 0, 3]"),
        (npy(np.asfortranarray(np.zeros((4, 5, 3), np.uint8))), "Fortran"),
        (npy(np.array([{}]), allow_pickle=True), "object"),
        (npy(np.zeros((4, 4, 3), np.uint8))[:-1], "truncated"),
        (b"\x93NUMPY\x07\x00", "version"),
    ],
)
def test_other_arrays_are_refused(data, word):
    with pytest.raises(ValueError, match=re.escape(word)) as raised:
        decode_bytes(data, PixelFormat(3, 8))
    assert "\n" not in str(raised.value)
    with pytest.raises(CorruptSample):
        decode(sample_of(data))


def sample_of(data: bytes) -> Sample:
    return Sample(shard="s.tar", number=0, sample_id=0, label=0, data=data)


def test_another_number_of_channels_ends_the_run_and_replaces_nothing():
    with refused("4 channels", "3 numbers", "student.in_chans", error=ShardError) as raised:
        decode(sample_of(npy(np.zeros((4, 4, 4), np.uint8))))
    assert not isinstance(raised.value, CorruptSample)


@pytest.mark.parametrize("bits, dtype", [(8, torch.uint8), (16, torch.float32)])
def test_batches_have_the_channels_and_the_depth_of_the_recipe(tmp_path, bits, dtype):
    """Constant planes stay what they are under every crop."""
    planes = np.array([300, 20_000, 40_000, 60_000, 65_535], np.uint16)
    images = [np.broadcast_to(planes, (20, 24, 5)).copy() for _ in range(4)]
    samples = [NewSample(number, "npy", npy(image), 24, 20, 0) for number, image in enumerate(images)]
    write_manifest(
        tmp_path, classes=["a"], seed=0, shards=[write_shard(tmp_path, "shard-000000.tar", samples)]
    )
    shard_set, pixels = ShardSet.open(tmp_path, label="DST"), PixelFormat(5, bits)
    spec = BatchSpec(
        img_size=16,
        num_patches=16,
        crop_scale=(0.2, 1),
        flip=True,
        seed=0,
        global_batch=4,
        micro_batch=4,
        pixels=pixels,
    )
    settings = {"num_workers": 0, "pin_memory": False}
    (trained,) = train_batches(shard_set, spec, start_step=0, stop_step=1, **settings)
    (judged,) = eval_batches(
        shard_set, img_size=16, crop_pct=1.0, batch_size=4, rank=0, world_size=1, pixels=pixels, **settings
    )
    expected = torch.from_numpy(planes.astype(np.float32)) / 257
    for batch in (trained, judged):
        assert batch.images.shape == (4, 5, 16, 16) and batch.images.dtype == dtype
        error = (batch.images.float() - expected[:, None, None]).abs().max()
        assert error < (1e-2 if bits == 16 else 1.01)
