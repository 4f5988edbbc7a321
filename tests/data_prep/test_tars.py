"""data_prep/{scan,tars,index}.py: tars of other people give all images, or a line says what they are."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import pytest

from data_prep.verify import verify_shards
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shards import ShardError
from tests.data_prep.test_index import index, make_image
from tests.messages import refused


def write(path, *members, form=tarfile.GNU_FORMAT):
    """Members are (name, bytes) or (name, target, type)."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content, *kind in members:
            info = tarfile.TarInfo(name)
            if kind:
                (info.type,), info.linkname = kind, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def read(folder, **options):
    """[(image, label), ...] of the tars in a folder, through the index."""
    shard_set = index(folder, overwrite=True, **options)
    verify_shards(folder)
    reader = SampleReader(shard_set)
    samples = [reader.read(number) for number in range(shard_set.num_samples)]
    return [(sample.data, sample.label) for sample in samples]


HARD, SYMBOLIC = tarfile.LNKTYPE, tarfile.SYMTYPE
A, B = make_image(1), make_image(2)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_are_the_members_that_they_mean(tmp_path, form):
    long = "x/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 150)
    members = [
        (f"{long}.jpg", A),
        (f"{long}.cls", b"3"),
        ("x/1.jpg", f"{long}.jpg", HARD),
        ("x/1.cls", f"./{long}.cls", HARD),
        ("x/2.jpg", "1.jpg", SYMBOLIC),
        ("x/2.cls", b"2"),
        ("y/3.jpg", "../z/4.jpg", SYMBOLIC),  # to a later one
        ("y/3.cls", b"1"),
        ("z/4.jpg", B),
        ("z/4.cls", b"0"),
    ]
    write(tmp_path / "a.tar", *members, form=form)
    assert read(tmp_path) == [(A, 3), (A, 3), (A, 2), (B, 1), (B, 0)]
    names = [json.loads(line) for line in (tmp_path / "sources.txt").open()]
    assert names[1] == "a.tar/x/1.jpg"


@pytest.mark.parametrize("target", ["/etc/passwd", "../../0.jpg", "1.jpg", "gone.jpg", "2.jpg"])
def test_links_out_of_the_tar_and_loops_are_told(tmp_path, target):
    links = [("1.jpg", target, SYMBOLIC), ("2.jpg", "1.jpg", SYMBOLIC)]
    write(tmp_path / "a.tar", ("0.jpg", A), *links)
    with refused("2 are not", "1.jpg", "symbolic link", target, "--max-skip 2", error=ShardError):
        index(tmp_path)
    assert read(tmp_path, max_skip=2) == [(A, -1)]


def test_links_and_folders_have_no_data_whatever_their_header_says(tmp_path):
    """Old tar programs write the size of the target into the header of a link."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        members = [
            ("x", tarfile.DIRTYPE, 700),
            ("x/0.jpg", tarfile.REGTYPE, A),
            ("x/0.cls", tarfile.REGTYPE, b"3"),
            ("x/1.jpg", HARD, len(A)),
            ("x/1.cls", SYMBOLIC, 1),
            ("y", tarfile.DIRTYPE, 10**6),  # more than the tar has
            ("y/2.jpg", tarfile.REGTYPE, B),
            ("y/2.txt", tarfile.FIFOTYPE, 2000),
            ("y/2.cls", tarfile.REGTYPE, b"4"),
        ]
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "x/0.jpg" if kind == HARD else "0.cls"
            is_file = isinstance(content, bytes)
            info.size = len(content) if is_file else content
            tar.addfile(info, io.BytesIO(content) if is_file else None)
    assert read(tmp_path) == [(A, 3), (A, 3), (B, 4)]


SPARSE = {
    "0.0": {"GNU.sparse.size": "9", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0"},
    "0.1": {"GNU.sparse.size": "9", "GNU.sparse.map": "0,9"},
    "1.0": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "1.jpg"},
}


@pytest.mark.parametrize("pax", [{}, *SPARSE.values()], ids=["GNU", *SPARSE])
def test_sparse_files_are_refused(tmp_path, pax):
    """Their bytes in the tar are not those of the image."""
    info = tarfile.TarInfo("1.jpg")
    info.size, info.type, info.pax_headers = len(B), tarfile.REGTYPE if pax else tarfile.GNUTYPE_SPARSE, pax
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    write_one_more(tmp_path / "a.tar", info, form=form)
    with refused("a.tar", "sparse file", "--sparse", error=ShardError) as raised:
        index(tmp_path)
    assert "copy it again" not in str(raised.value)


PARTS = {"GNU.volume.filename": "1.jpg", "GNU.volume.size": "500", "GNU.volume.offset": "7680"}


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["GNU", "pax"])
def test_a_part_of_several_volumes_is_refused(tmp_path, parts):
    """It begins with the rest of a file whose start is in another one."""
    info = tarfile.TarInfo("GNUFileParts/1.jpg.2" if parts else "1.jpg")
    info.size, info.type = len(B), tarfile.REGTYPE if parts else b"M"
    form = tarfile.PAX_FORMAT if parts else tarfile.GNU_FORMAT
    write_one_more(tmp_path / "a.tar", info, form=form, pax_headers=parts)
    with refused("a.tar", "several volumes", "one tar", error=ShardError) as raised:
        index(tmp_path)
    assert "copy it again" not in str(raised.value)


def test_a_label_of_a_volume_is_no_part_of_several(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.size = len(B)
    label = {"GNU.volume.label": "digits"}
    write_one_more(tmp_path / "a.tar", info, form=tarfile.PAX_FORMAT, pax_headers=label)
    assert read(tmp_path) == [(A, -1), (B, -1)]


def write_one_more(path, info, **options):
    """A tar of 0.jpg and a member that has the bytes of B."""
    with tarfile.open(path, "w", format=options.pop("form"), **options) as tar:
        first = tarfile.TarInfo("0.jpg")
        first.size = len(A)
        tar.addfile(first, io.BytesIO(A))
        tar.addfile(info, io.BytesIO(B))


def test_special_members_are_told(tmp_path):
    write(tmp_path / "a.tar", ("0.jpg", A), ("1.jpg", "", tarfile.FIFOTYPE), ("2.jpg", "", b"Z"))
    with refused("2 are not", "'1.jpg' is a pipe", error=ShardError):
        index(tmp_path)


@pytest.mark.parametrize("order", ["images, labels", "labels, images", "one late"])
def test_members_that_stand_apart_are_joined(tmp_path, order):
    images = [(f"{number}.jpg", make_image(number)) for number in (1, 2, 4)]
    labels = [(f"{number}.cls", b"%d" % number) for number in (1, 2, 4)]
    members = images + labels if order == "images, labels" else labels + images
    if order == "one late":
        members = [images[0], images[1], labels[1], images[2], labels[2], labels[0]]
    write(tmp_path / "a.tar", *members)
    assert read(tmp_path) == [
        (data, int(label)) for (_, data), (_, label) in zip(images, labels, strict=True)
    ]


def test_equal_keys_with_an_image_each_are_two_samples(tmp_path):
    write(
        tmp_path / "a.tar",
        ("0.jpg", A),
        ("0.cls", b"1"),
        ("1.jpg", B),
        ("1.cls", b"0"),
        ("0.jpg", B),
        ("0.cls", b"2"),
    )
    assert read(tmp_path) == [(A, 1), (B, 0), (B, 2)]


def test_several_tars_in_one_file_are_read(tmp_path):
    for name, data in (("a", A), ("b", B)):
        write(tmp_path / f"{name}.tar", ("0.jpg", data))
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").unlink()
    (tmp_path / "a.tar").write_bytes(both)
    assert read(tmp_path) == [(A, -1), (B, -1)]


def test_unusual_ends(tmp_path):
    path = tmp_path / "a.tar"
    write(path, ("0.jpg", A))
    whole = path.read_bytes()
    content = whole.rstrip(b"\0")
    content += bytes(-len(content) % 512)
    for end in (bytes(512), bytes(700), bytes(1024), bytes(10**5)):
        path.write_bytes(content + end)
        assert read(tmp_path) == [(A, -1)]
    for end, word in (
        (b"", "cut at byte"),
        (bytes(1024) + b"\n", "follow the end"),
        (bytes(512) + whole, "follow"),
    ):
        path.write_bytes(content + end)
        with refused("a.tar", word, "copy it again", error=ShardError):
            index(tmp_path, overwrite=True)


PACKED = {
    "gunzip": gzip.compress,
    "bunzip2": bz2.compress,
    "xz -dc": lzma.compress,
    "zip archive": lambda data: b"PK\x03\x04" + data,
    "web page": lambda data: b"<!DOCTYPE html><html>404" + bytes(600),
    "git lfs pull": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 600,
}


@pytest.mark.parametrize("word, pack", PACKED.items())
def test_other_files_named_tar_are_called_what_they_are(tmp_path, word, pack):
    write(tmp_path / "a.tar", ("0.jpg", make_image(9)), ("1.jpg", make_image(8)))
    (tmp_path / "a.tar").write_bytes(pack((tmp_path / "a.tar").read_bytes()))
    with refused("a.tar", word, error=ShardError) as raised:
        index(tmp_path)
    assert "copy it again" not in str(raised.value)


def test_compressed_tars_next_to_plain_ones_are_told(tmp_path, capsys):
    (tmp_path / "b.tar.gz").touch()
    (tmp_path / "c.tgz").touch()
    with refused("no .tar files", "2 compressed", "b.tar.gz", error=ShardError):
        index(tmp_path)
    write(tmp_path / "a.tar", ("0.jpg", A))
    assert read(tmp_path) == [(A, -1)]
    assert "2 compressed" in capsys.readouterr().out


def test_advice_leads_on(tmp_path):
    write(tmp_path / "a.tar", ("0.v2.jpg", A), ("0.v2.cls", b"1"))
    with refused("0 samples", "--image v2.jpg", error=ShardError) as raised:
        index(tmp_path)
    assert "--max-skip" not in str(raised.value)  # nothing would be left
    assert read(tmp_path, image="v2.jpg", label="v2.cls") == [(A, 1)]
    write(tmp_path / "a.tar", ("0.jpg", A), ("1.jpg", B), ("1.cls", b"1"))
    with refused("1 of 2 samples", "'a.tar/0.jpg'", ".cls", "--label none", error=ShardError):
        index(tmp_path, overwrite=True)
    assert read(tmp_path, label="none") == [(A, -1), (B, -1)]


def test_all_unusable_samples_are_told_at_once(tmp_path, capsys):
    for number in range(3):
        write(tmp_path / f"{number}.tar", ("0.jpg", A), ("1.jpg", b"no image"), ("2.txt", b"x"))
    with refused("3 samples", "6 are not", "--max-skip 6 (now 1)", error=ShardError):
        index(tmp_path, max_skip=1)
    assert capsys.readouterr().out.count("going on") == 1
    assert len(read(tmp_path, max_skip=6)) == 3


def test_names_of_classes_are_read_from_a_list_and_empty_ones_are_told(tmp_path, capsys):
    write(tmp_path / "a.tar", ("0.jpg", A), ("0.cls", b"0"), ("1.jpg", B), ("1.cls", b"2"))
    (tmp_path / "list.csv").write_text("id,name\n0,ant\n1,bee\n2,polar bear\n3,Bee\n")
    shard_set = index(tmp_path, classes=tmp_path / "list.csv")
    out = capsys.readouterr().out
    assert shard_set.classes == ["ant", "bee", "polar bear", "Bee"]
    assert all(
        word in out for word in ("header", "2 of 4 classes are without an image: 'bee', 'Bee'", "2 classes")
    )
    (tmp_path / "list.csv").write_text("name\nant\nbee\n")  # with the header there would be enough lines
    with refused("--classes", "2 lines", "the largest label is 2", error=ShardError):
        index(tmp_path, classes=tmp_path / "list.csv", overwrite=True)
