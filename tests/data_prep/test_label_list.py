"""data_prep/label_list.py: lists of labels as people write them; errors name the line."""

import os
import unicodedata

import pytest

from data_prep.find import find_images
from dmae_ds.data.shards import ShardError
from tests.messages import refused

NUMBERS = {"a 1.jpg": 10, "b.JPEG": 2, "sub/c.png": 10, "sub/d.v2.jpg": 0}
NAMES = {"a 1.jpg": "polar bear", "b.JPEG": "cat", "sub/c.png": "polar bear", "sub/d.v2.jpg": "dog, small"}


@pytest.fixture
def flat(tmp_path):
    for name in NUMBERS:
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "val"


def read(flat, text, *, encoding="utf-8", classes=None):
    """({image: name of its class}, the listing)"""
    path = flat.parent / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    classes_file = None
    if classes is not None:
        classes_file = flat.parent / "classes.txt"
        classes_file.write_text("\n".join(classes))
    listing = find_images(flat, labels_file=path, classes_file=classes_file)
    paths = [os.fsdecode(listing.path(number)) for number in range(len(listing))]
    found = {path: listing.classes[label] for path, label in zip(paths, listing.labels, strict=True)}
    return found, listing


def lines(pattern, labels, *, header=(), rename=str):
    text = [pattern.format(rename(name), label) for name, label in labels.items()]
    return "\n".join([*header, *text]) + "\n"


BASE = {"sub/c.png": "c.png", "sub/d.v2.jpg": "d.v2.jpg"}
FORMS = {
    "tabs": ("{}\t{}", {}, {}),
    "semicolons": ("{};{}", {}, {"header": ["image;class_id"]}),
    "quotes": ('"{}","{}"', {}, {}),
    "quotes and blanks": ('"{}" {}', {}, {}),
    "one quote": ("'{}' {}", {}, {}),
    "blanks after commas": ("{} , {}", {}, {"header": ["# made by hand", ""]}),
    "label first": ("{1},{0}", {}, {}),
    "label first by its header": (
        "{1},{0}",
        {},
        {"header": ["label,file_name"], "rename": lambda n: n.rpartition(".")[0]},
    ),
    "pandas": ("7,{},{}.0", {}, {"header": [",filename,label"]}),
    "Windows": ("{}\t{}", {}, {"rename": lambda n: ".\\" + n.replace("/", "\\")}),
    "absolute": ("{} {}", {}, {"rename": "/data/old/val/{}".format}),
    "further up": ("{},{}", {}, {"header": ["path,category"], "rename": "val/{}".format}),
    "base names": ("{},{}", {}, {"rename": lambda n: BASE.get(n, n)}),
    "byte order mark": ("{},{}", {"encoding": "utf-8-sig"}, {"header": ["id,y"]}),
    "Excel's text": ("{}\t{}\r", {"encoding": "utf-16"}, {"header": ["image name\tlabel\r"]}),
}


@pytest.mark.parametrize("pattern, options, more", FORMS.values(), ids=FORMS)
def test_forms_of_lists_with_numbers(flat, pattern, options, more):
    found, listing = read(flat, lines(pattern, NUMBERS, **more), **options)
    assert found == {name: str(label) for name, label in NUMBERS.items()}
    assert listing.classes == [str(label) for label in range(11)] and listing.skipped == []
    is_told = any("header" in note for note in listing.notes)
    assert is_told == any("#" not in line for line in more.get("header", ()) if line)


def test_names_of_classes_may_have_blanks_and_commas(flat):
    expected = sorted(set(NAMES.values()))
    for pattern in ("{}\t{}", '"{}","{}"', '"{}";"{}"', '"{}" "{}"'):
        found, listing = read(flat, lines(pattern, NAMES, header=["filename,what"][: pattern == '"{}","{}"']))
        assert (found, listing.classes) == (NAMES, expected), pattern
    unspaced = {name: label for name, label in NAMES.items() if " " not in name}
    assert read(flat, lines("{} {}", unspaced))[0] == unspaced


def test_encodings_of_names_and_labels(flat):
    nfd = unicodedata.normalize("NFD", "Müller.jpg")
    (flat / nfd).touch()
    found, _ = read(flat, "Müller.jpg,0\nb,1\n")
    assert found == {nfd: "0", "b.JPEG": "1"}
    found, _ = read(flat, "Müller.jpg;Bär\nb.JPEG;Löwe\n", encoding="cp1252")
    assert found == {nfd: "Bär", "b.JPEG": "Löwe"}
    (flat / "\udcff.jpg").touch()  # a name that is no UTF-8, as `ls` writes it
    assert read(flat, b"\xff.jpg 0\nb 1\n")[1].classes == ["0", "1"]


def test_lines_without_an_image_and_images_without_a_line_are_told(flat):
    found, listing = read(flat, "A_1.jpg,0\nb.JPEG,1\nx.jpg,2\nsub/c,0\nsub/d.v2,1\n")
    assert len(found) == 3 and len(listing.classes) == 3
    assert [
        note for note in listing.notes if "2 of 5 lines" in note and "line 1" in note and "A_1.jpg" in note
    ]
    (skipped,) = listing.skipped
    assert skipped["source"] == "a 1.jpg" and "line 1" in skipped["reason"] and "A_1.jpg" in skipped["reason"]


def test_a_base_name_of_several_images_means_none(flat):
    (flat / "c.jpg").touch()
    (flat / "other").mkdir()
    (flat / "other" / "d.v2.jpg").touch()
    found, listing = read(flat, "d.v2.jpg,0\nc.png,1\nb,0\n")
    assert found == {"sub/c.png": "1", "b.JPEG": "0"} and "d.v2.jpg" in listing.notes[0]


def test_folders_in_front_are_those_of_src(flat):
    text = "".join(
        f"{part}/{name},{number}\n" for number, part in enumerate(("train", "val")) for name in NUMBERS
    )
    found, listing = read(flat, text)
    assert set(found.values()) == {"1"} and "4 of 8 lines" in listing.notes[0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a 1,0\nb,1\nsub/c,cat\n", ("line 3", "'cat'", "2 lines", "--classes")),
        ("a 1,cat\nb,dog\nsub/c,7\nsub/d.v2,cat\n", ("line 3", "'7'")),
        ("a 1,0\nb,\nsub/c,1\n", ("line 2", "found 'b,'")),
        ("a 1,0,5\nb,1,5\n", ("line 1", "3 columns", "header")),
        ("image,MEL,NV\na 1,0,1\n", ("line 1", "3 columns")),
        ("a 1,0\n./a 1.jpg,1\n", ("line 2", "two labels", "line 1")),
        ("x/y/1,0\nx/y/2,1\n", ("none of its 2 lines", "'x/y/1'", "'a 1.jpg'")),
        (b"PK\x03\x04\0\0", ("not a text file", "CSV")),
        ('{"a 1.jpg": 0,\n "b.JPEG": 1}', ("none of its 2 lines",)),
    ],
)
def test_lists_that_cannot_be_used_are_refused_by_line(flat, text, words):
    with refused("--labels", "list.txt", *words, error=ShardError):
        read(flat, text)


def test_numbers_that_are_names_need_a_list_of_classes(flat):
    text = "a 1,7\nb,A\nsub/c,7\nsub/d.v2,B\n"
    found, listing = read(flat, text, classes=["A", "B", "7"])
    assert listing.classes == ["A", "B", "7"] and found["a 1.jpg"] == "7"


def test_class_names_with_blanks_are_matched_with_labels(flat):
    found, _ = read(flat, lines("{}\t{}", NAMES), classes=["cat", '"dog, small"', "polar bear", "panda"])
    assert found == NAMES
    _, listing = read(flat, "a 1,1\nb,0\n", classes=["n01 tench, Tinca tinca", "n02 goldfish"])
    assert listing.classes == ["n01", "n02"]
    _, listing = read(flat, "a 1,1\nb,0\n", classes=["polar bear", "tabby cat"])
    assert listing.classes == ["polar bear", "tabby cat"]
