"""data_prep/{scan,tars,index,verify}.py: tars are indexed as webdataset reads them; damage is named."""

import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_prep.index import find_tars, index_tars
from data_prep.make import MakeOptions, make_shards
from data_prep.scan import scan_tar
from data_prep.verify import verify_shards
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def make_image(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG" if number % 3 == 0 else "JPEG")
    return file.getvalue()


def write_tar(path, members, *, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def index(tars, dst=None, **changes):
    settings = {
        "image": None,
        "label": None,
        "classes": None,
        "workers": 1,
        "max_skip": 0,
        "overwrite": False,
    }
    index_tars(str(tars), dst=dst, **(settings | changes))
    return ShardSet.open(dst or tars, label="DST")


LONG = "train/" + "n" * 120 + "/" + "k" * 110


@pytest.fixture
def tars(tmp_path):
    """Three tars in the three formats that tar programs write."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        names = [LONG, f"n0ü{number}"]
        if form == tarfile.USTAR_FORMAT:
            names = [f"../x/{number}", f"/etc/{number}"]
        members = [("__info__.txt", b"x"), ("README", b"no sample")]
        for place, name in enumerate(names):
            members += [
                (f"{name}.{'JPG' if place else 'png'}", make_image(3 * number + place)),
                (f"{name}.cls", b"%d\n" % (number + place)),
            ]
            members += [(f"{name}.seg.png", b"a mask"), (f"{name}.json", json.dumps({"y": place}).encode())]
        write_tar(folder / f"imagenet-{number}.tar", members, form=form)
    return folder


def test_existing_tars_are_indexed_as_webdataset_reads_them(tars):
    webdataset = pytest.importorskip("webdataset")
    shard_set = index(tars)
    theirs = [
        (sample.get("jpg", sample.get("png")), int(sample["cls"]))
        for sample in webdataset.WebDataset(sorted(map(str, tars.glob("*.tar"))), shardshuffle=False)
        if "cls" in sample
    ]
    ours = []
    for shard in range(3):
        data = (tars / shard_set.shards[shard].name).read_bytes()
        ours += [
            (data[row["offset"] : row["offset"] + row["size"]], row["label"])
            for row in shard_set.open_index(shard)
        ]
    assert ours == theirs and len(ours) == 6
    assert shard_set.classes == ["0", "1", "2", "3"] and shard_set.seed is None and shard_set.base is None
    names = [json.loads(line) for line in (tars / "sources.txt").open()]
    expected = ["imagenet-0.tar/../x/0.png", "imagenet-0.tar//etc/0.JPG", f"imagenet-1.tar/{LONG}.png"]
    assert names[:3] == expected
    verify_shards(tars)


def test_scan_finds_the_same_members_as_tarfile(tars):
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar, open(path, "rb") as file:
            expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers()]
            assert [tuple(member)[:3] for member in scan_tar(file)] == expected


def test_hostile_names_make_no_files(tars, tmp_path):
    before = {path for path in tmp_path.rglob("*")}
    index(tars, tmp_path / "dst", workers=2)
    assert {path.parent for path in set(tmp_path.rglob("*")) - before} <= {tmp_path, tmp_path / "dst"}
    assert not os.path.exists("/etc/0.JPG")


def test_an_index_is_next_to_the_tars_or_elsewhere(tars, tmp_path):
    elsewhere = index(tars, tmp_path / "dst")
    assert elsewhere.base == str(tars) and elsewhere.fingerprint == index(tars).fingerprint
    verify_shards(tmp_path / "dst", sample=0.5)
    with refused("DST", "manifest.json", "--overwrite", error=ShardError):
        index(tars)
    index(tars, overwrite=True)


def test_some_labels_of_minus_one_are_told(tmp_path):
    for name, labels in (("some", (0, -1, 1)), ("none", (-1, -1, -1))):
        members = []
        for number, label in enumerate(labels):
            members += [(f"{number}.png", make_image(0)), (f"{number}.cls", b"%d" % label)]
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "0.tar", members)
    with refused("1 of 3", "-1", error=ShardError):
        index(tmp_path / "some", tmp_path / "a")
    assert index(tmp_path / "none", tmp_path / "b").classes == []


def test_labels_of_other_members_and_none(tars, tmp_path):
    assert index(tars, tmp_path / "a", label="json:y").open_index(2)["label"].tolist() == [0, 1]
    unlabelled = index(tars, tmp_path / "b", label="class")
    assert unlabelled.classes == [] and set(unlabelled.open_index(0)["label"]) == {-1}
    for label, words in (("json:z", (".json", "'z'")), ("text:y", ("--label", "text:y", "json:KEY"))):
        with refused(*words, error=ShardError):
            index(tars, tmp_path / "c", label=label)


class Exploding:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_pickles_are_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tar(
        tmp_path / "a.tar",
        [
            ("0.jpg", make_image(1)),
            ("0.pyd", pickle.dumps(Exploding())),
            ("0.cls", pickle.dumps(Exploding())),
        ],
    )
    with refused("label", "0 to 1,000,000", error=ShardError):
        index(tmp_path)
    index(tmp_path, label="pyd.cls")
    assert not (tmp_path / "exploded").exists()


def test_unusable_samples_are_listed(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("0.txt", b"x"), ("1.jpg", b"no image"), ("2.jpg", make_image(1)), ("3.jpg", make_image(2)[:-9])],
    )
    with refused("1 samples", "3 are not", "skipped.jsonl", "--max-skip", error=ShardError):
        index(tmp_path)
    assert index(tmp_path, max_skip=3).num_samples == 1
    reasons = [json.loads(line)["reason"].split(":")[0] for line in (tmp_path / "skipped.jsonl").open()]
    assert reasons == [
        "no member .jpg, .jpeg, .png, but .txt",
        "not a JPEG or PNG image, which are read as 8-bit RGB",
        "truncated",
    ]
    verify_shards(tmp_path)


@pytest.mark.parametrize("cut", [512, 700, 2048, -10240, -10241])
def test_a_cut_tar_is_an_error_not_fewer_samples(tmp_path, cut):
    write_tar(tmp_path / "a.tar", [(f"{number}.jpg", make_image(number)) for number in range(1, 8)])
    data = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512) + bytes(10240)
    (tmp_path / "a.tar").write_bytes(data[:cut])
    with refused("a.tar", "cut at byte", error=ShardError):
        index(tmp_path)


def test_mutated_tars_give_samples_or_one_line(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            (f"{LONG}{number}.{kind}", data)
            for number in range(3)
            for kind, data in (("jpg", make_image(1)[:700]), ("cls", b"1"))
        ],
        form=tarfile.PAX_FORMAT,
    )
    good, rng = (tmp_path / "a.tar").read_bytes(), random.Random(0)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] = rng.choice([0, 0x30, 0x37, 0x78, 0x80, 0xFF, rng.randrange(256)])
        try:
            for member in scan_tar(io.BytesIO(data[: rng.choice([len(data), rng.randrange(len(data))])])):
                assert member.data is None or len(member.data) == member.size
        except ValueError as error:
            assert "byte" in str(error)


def test_a_pattern_of_remote_tars_is_expanded():
    base, names = find_tars("https://host/x/train-{008..011}.tar")
    assert (base, names) == ("https://host/x", [f"train-{number:03d}.tar" for number in range(8, 12)])


@pytest.fixture
def dst(src, tmp_path):
    make_shards(src, tmp_path / "dst", MakeOptions(samples_per_shard=5), num_workers=1)
    return tmp_path / "dst"


def change(path, position, byte=None):
    data = bytearray(path.read_bytes())
    data[position] = data[position] ^ 1 if byte is None else byte
    path.write_bytes(data)


def test_verify_accepts_a_set_as_it_was_written(dst, capsys):
    verify_shards(dst, workers=2)
    assert "12 of 12 samples in 3 shards" in capsys.readouterr().out
    verify_shards(dst, sample=0.01)
    assert "3 of 12 samples" in capsys.readouterr().out


@pytest.mark.parametrize("sample", [1.0, 0.9999])
def test_verify_names_what_differs(dst, sample, capsys):
    shard_set = ShardSet.open(dst, label="DST")
    row, other = shard_set.open_index(1)[2], shard_set.open_index(0)[1]
    change(dst / "shard-000001.tar", int(row["offset"]) + int(row["size"]) // 2)  # a byte of an image
    label = int(other["offset"]) + int(other["size"])
    change(dst / "shard-000000.tar", label + -label % 512 + 512, ord("2"))  # a label
    change(dst / "shard-000002.index.npy", -1)
    change(dst / "sources.txt", 3)
    with refused("DST", "4 places", error=ShardError):
        verify_shards(dst, sample=sample)
    out = capsys.readouterr().out
    assert f"shard-000001.tar: sample {row['number']:09d}: " in out and "crc32" in out
    assert f"shard-000000.tar: sample {other['number']:09d}: " in out and "label" in out
    assert "shard-000002.index.npy" in out and "sources.txt" in out


def test_verify_finds_damaged_tar_headers(dst, capsys):
    row = ShardSet.open(dst, label="DST").open_index(1)[2]
    change(dst / "shard-000001.tar", int(row["offset"]) - 512)
    with refused("1 places", error=ShardError):
        verify_shards(dst)
    assert f"shard-000001.tar: byte {row['offset'] - 512}" in capsys.readouterr().out
