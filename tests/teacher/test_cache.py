"""Stored features: every row lies in one place, comes back, and a changed byte is noticed."""

from __future__ import annotations

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.data.storage import Access
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed, UserError
from dmae_ds.teacher.build import locate_teacher
from dmae_ds.teacher.cache_codec import Codec, FitSums, build_codecs, check_pca, fit, needs_fit, write_codec
from dmae_ds.teacher.cache_file import FileWriter, RowReader
from dmae_ds.teacher.cache_layout import CODEC, SUMS, Layout, StoredTap
from dmae_ds.teacher.cache_manifest import Manifest
from dmae_ds.teacher.early import open_manifest
from dmae_ds.teacher.stored import StoredTeacher
from dmae_ds.tools.early import CacheRequest
from dmae_ds.tools.teacher_cache import CacheWriter
from tests.data.flaky_server import serve
from tests.messages import refused


def tap(stored: str = "float32", *, shape=(1, 5, 24), dtype="float32", width: int | None = None) -> StoredTap:
    return StoredTap("block/3", shape, dtype, stored, width or shape[-1])


def layout() -> Layout:
    return Layout(global_batch=12, lane_rows=3, num_steps=7, steps_per_file=3, taps=(tap(),))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_every_row_lies_in_one_place_whoever_reads_it(ranks):
    places, share = {}, 12 // ranks
    for step in range(7):
        for rank in range(ranks):
            row = step * 12 + rank * share
            for piece in layout().pieces(row, share):
                assert piece.start + piece.count <= layout().num_rows(piece.first_step)
                for number in range(piece.count):
                    place = piece.first_step, piece.lane, piece.start + number
                    assert places.setdefault(place, row) == row
                    row += 1
    assert sorted(places.values()) == list(range(7 * 12))
    assert len(layout().sizes(layout().first_steps())) == 3 * 4


def test_a_file_is_neither_too_large_nor_of_many_steps():
    vit_large = StoredTap("block/18", (1, 50, 1024), "float32", "float32", 1024)
    large = Layout.of((vit_large,), global_batch=4096, lane_rows=64, num_steps=100)
    assert large.steps_per_file == 1 and large.row_bytes == 50 * 1024 * 4
    assert Layout.of((tap(),), global_batch=12, lane_rows=3, num_steps=100).steps_per_file == 16
    assert Layout.from_json(large.as_json()) == large


@pytest.fixture
def written(tmp_path):
    """The files of 7 steps whose rows are their number, and the layout."""
    lay = layout()
    for first in lay.first_steps():
        for lane in range(lay.num_lanes):
            with open(tmp_path / lay.file_name(first, lane), "wb") as file:
                writer = FileWriter(file, lay)
                for step in range(first, min(first + 3, 7)):
                    numbers = step * 12 + lane * 3 + np.arange(3)
                    rows = np.repeat(numbers.astype(np.uint8)[:, None], lay.row_bytes, axis=1)
                    sums = np.full((1, SUMS), 0.25)
                    writer.add(rows, epochs=numbers // 40, sample_ids=numbers * 7, sums=sums)
                writer.finish()
            assert (tmp_path / lay.file_name(first, lane)).stat().st_size == lay.file_bytes(first)
    return tmp_path, lay


def test_a_file_that_was_cut_short_is_written_again(written):
    folder, lay = written
    writer = SimpleNamespace(request=CacheRequest(folder))
    assert CacheWriter._missing(writer, lay) == []
    victim = folder / lay.file_name(3, 2)
    os.truncate(victim, victim.stat().st_size - 1)
    assert CacheWriter._missing(writer, lay) == [range(3, 6)]
    victim.unlink()
    assert CacheWriter._missing(writer, lay) == [range(3, 6)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
def test_rows_come_back_by_their_number(written, count):
    folder, lay = written
    reader = RowReader(str(folder), lay, access=Access())
    for step in (0, 4, 6):
        rows = np.empty((count, lay.row_bytes), np.uint8)
        entries = reader.read(step * 12 + 12 - count, rows)
        expected = step * 12 + 12 - count + np.arange(count)
        assert (rows == expected.astype(np.uint8)[:, None]).all()
        assert (entries["sample_id"] == expected * 7).all() and (entries["epoch"] == expected // 40).all()
    assert (reader.open(6, 0).sums == 0.25).all() and (reader.open(0, 0).sums == 0.75).all()


def test_a_cache_is_read_from_a_url(written):
    pytest.importorskip("aiohttp", reason="http:// is read with aiohttp: dmae-ds[remote]")
    folder, lay = written
    Manifest({"run.seed": 0}, {}, {}, {}, lay, None, True, {}).write(folder)
    with serve(folder) as server:
        access = Access(retries=2, timeout_s=10.0)
        assert open_manifest(server.url, access=access) == open_manifest(str(folder), access=access)
        reader, rows = RowReader(server.url, lay, access=access), np.empty((12, lay.row_bytes), np.uint8)
        reader.read(36, rows)
    assert (rows == (36 + np.arange(12)).astype(np.uint8)[:, None]).all()


@pytest.mark.parametrize("place", [0, 5 * 24 * 4, -1, -40])
def test_a_flipped_bit_is_noticed_and_the_file_named(written, place):
    folder, lay = written
    path = folder / lay.file_name(3, 2)
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)
    reader, rows = RowReader(str(folder), lay, access=Access()), np.empty((12, lay.row_bytes), np.uint8)
    reader.read(0, rows)
    with pytest.raises(UserError, match=path.name) as damaged:
        reader.read(36, rows)
    assert damaged.value.of_one_rank


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_features_come_back_bit_for_bit(dtype, views):
    features = torch.randn(views * 4, 5, 24).to(getattr(torch, dtype))
    codec = Codec(tap("float32", dtype=dtype, shape=(views, 5, 24)))
    raw = codec.encode(features)
    assert raw.shape == (4, codec.tap.num_bytes) and torch.equal(codec.decode(raw), features)
    assert codec.tap.is_exact and codec.error_sums(features, raw).tolist()[:2] == [0, 0]
    # a row has its own image's views: rows can be read with others than they were written with
    assert torch.equal(codec.decode(raw[1:3]), features.unflatten(0, (views, 4))[:, 1:3].flatten(0, 1))


@pytest.mark.parametrize(
    ("stored", "width", "worst"), [("bfloat16", 24, 4e-3), ("int8", 24, 9e-3), ("float32", 8, 0.05)]
)
def test_narrow_features_lose_little_and_say_how_much(stored, width, worst, tmp_path):
    """Features with a mean, one channel of a hundred times the others', and eight directions of variance."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(400, 5, 8, generator=generator) @ torch.randn(8, 24, generator=generator)
    features = low + 0.05 * torch.randn(400, 5, 24, generator=generator) + 3
    if width == 24:
        features[..., 3] *= 100
    narrow = tap(stored, width=width)
    fitted, content = {}, None
    if needs_fit(narrow):
        sums = FitSums(24, features.abs().max().item(), torch.device("cpu"))
        sums.add(features[:200])
        sums.add(features[200:])
        mean, covariance = sums.moments()
        vectors = features.flatten(0, 1).double()
        assert torch.allclose(mean, vectors.mean(0), atol=0.05)
        assert torch.allclose(covariance, torch.cov(vectors.T, correction=0), rtol=0.01, atol=0.5)
        fitted = {narrow.name: fit(narrow, mean, covariance)}
        write_codec(tmp_path, fitted)
        content = (tmp_path / CODEC).read_bytes()
    (codec,) = build_codecs((narrow,), content, torch.device("cpu"))
    raw = codec.encode(features)
    restored = codec.decode(raw)
    assert restored.shape == features.shape and not narrow.is_exact
    of_two_views = tap(stored, width=width, shape=(2, 5, 24))
    (other,) = build_codecs((of_two_views,), content, torch.device("cpu"))
    assert torch.equal(other.decode(other.encode(features)), restored)
    error, size, cosine, count = codec.error_sums(features, raw).tolist()
    assert (error / size) ** 0.5 == pytest.approx(
        ((restored - features).norm() / features.norm()).item(), rel=1e-3
    )
    assert 0 < (error / size) ** 0.5 < worst and cosine / count > 1 - worst**2 and count == 400 * 5


def test_means_and_directions_do_not_depend_on_the_order():
    features = torch.randn(64, 5, 24) * 10
    orders = [features, features.flip(0), features[torch.randperm(64)]]
    moments = []
    for order in orders:
        sums = FitSums(24, 40.0, torch.device("cpu"))
        for part in order.split(7):
            sums.add(part)
        moments.append(sums.moments())
    for mean, covariance in moments[1:]:
        assert torch.equal(mean, moments[0][0]) and torch.equal(covariance, moments[0][1])


def test_who_needs_the_network_of_a_stored_teacher_is_told_so():
    stored = TeacherConfig(name="vit_tiny_patch16_224", placement="cache", cache="features")
    with refused("teacher.placement cache", "teacher.weights"):
        locate_teacher(stored)


def test_directions_are_refused_where_there_are_none():
    check_pca(tap(), None)
    check_pca(tap(), 23)
    for wrong, dimensions in (
        (tap(), 24),
        (StoredTap("relation/3", (1, 3, 2, 5, 8), "float32", "int8", 8), 4),
    ):
        with pytest.raises(UserError, match=f"--pca {dimensions}"):
            check_pca(wrong, dimensions)


def test_means_are_of_thirty_two_vectors_a_channel_or_of_the_whole_run(monkeypatch):
    """Batches of 2 images of 5 vectors, 24 channels each."""
    steps, features = [], {"block/3": torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))}
    for name, value in (("gather_objects", lambda value: [value]), ("sum_over_ranks", lambda value: value)):
        monkeypatch.setattr(collectives, name, value)
    writer = SimpleNamespace(
        device=torch.device("cpu"), _stream=lambda some: steps.append(some) or [(None, None, features)]
    )
    for num_steps in (100, 50):
        layout = SimpleNamespace(taps=(tap("int8"),), global_batch=2, num_steps=num_steps)
        assert list(CacheWriter._fit(writer, layout, features)) == ["block/3"]
    assert steps == [range(math.ceil(32 * 24 / (2 * 5))), range(50)]


@pytest.mark.parametrize("wrong", [None, "sample_id", "epoch"])
def test_a_row_of_another_image_or_epoch_ends_the_run(wrong):
    entries = np.zeros(3, [("sample_id", np.int64), ("epoch", np.int64)])
    entries["sample_id"], entries["epoch"] = [7, 8, 9], 4
    batch = SimpleNamespace(
        rows=torch.tensor([20, 21, 22]), sample_ids=torch.tensor([7, 8, 9]), epochs=torch.full((3,), 4)
    )
    teacher = SimpleNamespace(
        manifest=SimpleNamespace(layout=SimpleNamespace(row_bytes=6)),
        device=torch.device("cpu"),
        reader=SimpleNamespace(read=lambda first, rows: entries),
        location="cache",
    )
    if wrong is None:
        assert StoredTeacher.read(teacher, batch).shape == (3, 6)
        return
    entries[wrong][1] += 1
    with refused("'cache'", "row 21", error=RunFailed):
        StoredTeacher.read(teacher, batch)
