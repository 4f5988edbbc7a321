"""data_prep/find.py: images and labels of every layout, in the order of their names."""

import pytest

from data_prep.find import find_images
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def entries(listing):
    """Paths and labels of a listing."""
    return [(listing.path(number).decode(), listing.labels[number]) for number in range(len(listing))]


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("b 1.jpg", "a.JPEG", "c.png"):
        (folder / name).touch()
    return folder


def write_lines(path, *text):
    """Write a text file; returns its path."""
    path.write_text("\n".join(text) + "\n")
    return path


def test_class_folders_are_numbered_by_name(src):
    listing = find_images(src)
    assert listing.classes == ["ant", "bee", "cat"]
    assert entries(listing)[:6] == [
        (f"ant/{name}", 0) for name in ("0.JPEG", "1.JPEG", "2.JPEG", "3.JPEG", "really-a-png.jpg", "x.png")
    ]
    assert entries(listing)[6:] == [(f"bee/{number}.jpg", 1) for number in range(6)]
    assert dict(listing.ignored) == {".txt": 2, "hidden": 2} and listing.skipped == []


def test_class_file_gives_the_numbers(src, tmp_path):
    listing = find_images(
        src, classes_file=write_lines(tmp_path / "classes", "cat", "dog", "bee a bee, say", "ant")
    )
    assert listing.classes == ["cat", "dog", "bee", "ant"]
    assert set(entries(listing)) >= {("ant/0.JPEG", 3), ("bee/0.jpg", 2)}
    with refused("--classes", "'bee'", error=ShardError):
        find_images(src, classes_file=write_lines(tmp_path / "classes", "cat", "ant"))
    with refused("--classes", "'cat'", "twice", error=ShardError):
        find_images(src, classes_file=write_lines(tmp_path / "classes", "cat", "ant", "bee", "cat"))


@pytest.mark.parametrize(
    "text, classes, expected",
    [
        (["a 2", "b 1.jpg\t0", "c.png,1"], ["0", "1", "2"], [2, 0, 1]),  # by number, with and without suffix
        (["a.JPEG n2", "b 1 n1", "c n2"], ["n1", "n2"], [1, 0, 1]),  # by name
    ],
)
def test_labels_file_of_a_flat_folder(flat, tmp_path, text, classes, expected):
    listing = find_images(flat, labels_file=write_lines(tmp_path / "labels", *text))
    assert listing.classes == classes
    assert entries(listing) == list(zip(["a.JPEG", "b 1.jpg", "c.png"], expected, strict=True))


def test_labels_and_class_names_together(flat, tmp_path):
    classes = write_lines(tmp_path / "classes", "n0 zero", "n1 one")
    listing = find_images(
        flat, labels_file=write_lines(tmp_path / "labels", "a n1", "b 1 0"), classes_file=classes
    )
    assert listing.classes == ["n0", "n1"] and entries(listing) == [("a.JPEG", 1), ("b 1.jpg", 0)]
    assert listing.skipped == [{"number": None, "source": "c.png", "reason": "no label in labels"}]


@pytest.mark.parametrize(
    "text, classes, words",
    [
        (["a"], None, ("line 1", "'a'", "`<image> <label>`")),
        (["a 1", "a 2"], None, ("line 2", "'a'", "two labels")),
        (["a 99999999"], None, ("99999999", "1,000,000")),
        ([""], None, ("is empty",)),
        (["a 1"], ["n0"], ("'1'", "1 classes", "--classes")),
    ],
)
def test_wrong_labels_are_refused(flat, tmp_path, text, classes, words):
    classes_file = None if classes is None else write_lines(tmp_path / "classes", *classes)
    labels_file = write_lines(tmp_path / "labels", *text)
    with refused("--labels", str(labels_file), *words, error=ShardError):
        find_images(flat, labels_file=labels_file, classes_file=classes_file)


def test_unlabelled_folders_are_walked(src):
    assert {label for _, label in entries(find_images(src, unlabelled=True))} == {-1}
    assert len(find_images(src, unlabelled=True)) == 12


def test_checksum_follows_names_labels_and_classes(src, tmp_path):
    checksums = [find_images(src).sha256(), find_images(src, unlabelled=True).sha256()]
    checksums.append(
        find_images(src, classes_file=write_lines(tmp_path / "classes", "bee", "ant", "cat")).sha256()
    )
    (src / "bee" / "0.jpg").rename(src / "bee" / "00.jpg")
    checksums.append(find_images(src).sha256())
    assert len(set(checksums)) == 4
