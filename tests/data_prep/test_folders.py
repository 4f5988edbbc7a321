"""data_prep/folders.py: what is in a folder tree besides classes and images is seen and said."""

import unicodedata

import pytest

from data_prep.find import find_images
from data_prep.folders import check_classes
from dmae_ds.data.shards import ShardError
from tests.messages import refused


def tree(folder, *paths):
    """Empty files, and folders for paths that end with a slash; returns the folder."""
    for path in paths:
        target = folder / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.touch()
    return folder


def paths_of(listing):
    return [listing.path(number).decode() for number in range(len(listing))]


@pytest.mark.parametrize(
    "name",
    [
        "$RECYCLE.BIN",
        "System Volume Information",
        "#recycle",
        "@Recycle",
        "Lost.Dir",
        "found.000",
        ".Trash-1000",
    ],
)
def test_folders_of_the_system_are_no_classes_at_any_depth(tmp_path, name):
    src = tree(tmp_path, "ant/1.jpg", "bee/2.jpg", f"{name}/x/3.jpg", f"bee/sub/{name}/4.jpg")
    for options in ({}, {"unlabelled": True}):
        listing = find_images(src, **options)
        assert paths_of(listing) == ["ant/1.jpg", "bee/2.jpg"]
        assert listing.ignored == {f"folder {name}": 2}
    assert find_images(src).classes == ["ant", "bee"] and find_images(src).notes == []


def test_a_file_may_have_such_a_name(tmp_path):
    assert len(find_images(tree(tmp_path, "ant/@eaDir.jpg", "ant/1.jpg"))) == 2


def test_classes_without_an_image_keep_their_number_and_are_told(tmp_path):
    src = tree(tmp_path / "src", "ant/1.jpg", "annotations/1.xml", "cat/", "dog/1.jpg", "eel/x/")
    listing = find_images(src)
    assert listing.classes == ["annotations", "ant", "cat", "dog", "eel"]
    (note,) = listing.notes
    assert all(word in note for word in ("3 of 5", "'annotations'", "'cat'", "'eel'"))
    classes = tmp_path / "classes.txt"
    classes.write_text("dog\nwolf\nant\nannotations\ncat\neel\n")
    assert "'wolf'" in find_images(src, classes_file=classes).notes[0]
    labels = tmp_path / "labels.txt"
    labels.write_text("ant/1 0\ndog/1 3\n")
    assert "2 of 4 classes are without an image: '1', '2'" in find_images(src, labels_file=labels).notes[-1]


@pytest.mark.parametrize(
    "paths, words",
    [
        (("train/ant/1.jpg", "train/bee/1.jpg", "val/ant/2.jpg"), ("'train', 'val'", "set/train DST`")),
        (("train2017/1.jpg", "val2017/2.jpg", "annotations/x.json"), ("'train2017'", "--unlabelled")),
        (("Training/ant/1.jpg", "docs/readme.txt"), ("'Training'", "set/Training DST`")),
        (("test/1.jpg", "train/a/2.jpg", "valid/a/3.jpg"), ("'test', 'train', 'valid'",)),
        (("cub/ant/1.jpg", "cub/bee/2.jpg"), ("set/cub'", "--unlabelled", "--classes")),
        (("data/raw/ant/1.jpg", "data/raw/bee/x/2.jpg"), ("set/data/raw'",)),
    ],
)
def test_src_above_the_classes_is_refused(tmp_path, paths, words):
    src = tree(tmp_path / "set", *paths)
    with refused("SRC", "too high", *words, error=ShardError):
        find_images(src)
    names = sorted(path.name for path in src.iterdir())
    (tmp_path / "classes.txt").write_text("\n".join(names))
    assert find_images(src, classes_file=tmp_path / "classes.txt").classes == names
    assert len(find_images(src, unlabelled=True)) == sum(path.endswith(".jpg") for path in paths)


@pytest.mark.parametrize(
    "paths, told",
    [
        (("ant/left/1.jpg", "bee/right/2.jpg"), True),  # perhaps: fold-0/<class>, fold-1/<class>
        (("ant/1.jpg", "bee/right/2.jpg"), False),
        (("train/1.jpg", "bus/1.jpg"), False),  # vehicles
        (("celeba/img/1.jpg", "celeba/img/2.jpg"), False),
    ],
)
def test_other_depths_are_accepted(tmp_path, paths, told):
    listing = find_images(tree(tmp_path, *paths))
    assert len(listing) == 2 and bool(listing.notes) == told
    assert all("too high" in note for note in listing.notes)


@pytest.mark.parametrize(
    "names, shown",
    [
        (["Cat", "cat", "dog"], "'Cat' and 'cat' are 2 classes"),
        (["golden retriever", "golden_retriever", "golden-retriever"], "3 classes"),
        (["dog", "dog "], "'dog' and 'dog '"),
        ([unicodedata.normalize(form, "Löwe") for form in ("NFC", "NFD")], r"'Lo\u0308we'"),
    ],
)
def test_two_spellings_of_one_name_are_told(names, shown):
    (note,) = check_classes(names, set(range(len(names))))
    assert shown in note
    assert check_classes(["cat", "cow", "scat"], {0, 1, 2}) == []


def test_other_kinds_of_images_are_told(tmp_path):
    src = tree(tmp_path, "ant/1.webp", "ant/2.webp", "bee/3.TIF", "bee/1.txt")
    with refused("no .jpg", "2 .webp", "1 .tif", "1 .txt", "convert", error=ShardError):
        find_images(src)
    tree(tmp_path, "bee/2.txt", "bee/4.tif", "bee/5.csv")  # a fourth and rare kind is not told
    with refused("2 .webp", "2 .tif", "2 .txt", error=ShardError) as raised:
        find_images(src)
    assert ".csv" not in str(raised.value)
