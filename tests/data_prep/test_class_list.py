"""data_prep/class_list.py: a list of classes gives each the number that its author means."""

import pytest

from data_prep.class_list import read_classes
from data_prep.dense import read_class_names
from dmae_ds.data.shards import ShardError
from tests.messages import refused

KNOWN = ["polar bear", "ant", "Löwe"]


def read(tmp_path, text, known=KNOWN, encoding="utf-8"):
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode(encoding))
    notes = []
    return read_classes(path, known, notes), notes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize(
    "text",
    [
        "polar bear\nant\nLöwe\n",
        '"polar bear"\r\n"ant"\r\n"Löwe"\r\n',
        "./train/polar bear/\ntrain\\ant\n./train/Löwe\n",
        "polar bear,white,a\nant,small,b\nLöwe,yellow,c\n",
        "n1\tpolar bear\nn2\tant\nn3\tLöwe",
        "class\npolar bear\nant\nLöwe\n",
        "id;class_name\n0;polar bear\n1;ant\n2;Löwe\n",
        "ant,1\nLöwe,2\npolar bear,0\n",
        "2 ant\n1 polar bear\n3 Löwe\n",
        "ant: 1\nLöwe: 2\npolar bear: 0\n",
    ],
)
def test_forms_of_lists(tmp_path, text, encoding):
    names, notes = read(tmp_path, text, encoding=encoding)
    assert names == ["polar bear", "ant", "Löwe"]
    assert bool(notes) == ("class" in text.splitlines()[0])


def test_names_are_read_without_folders_too(tmp_path):
    for text in (
        "label\ngolden retriever\nmodel 3\n",
        "golden retriever\nmodel 3\n",
        "1,model 3\n0,golden retriever",
    ):
        assert read(tmp_path, text, known=())[0] == ["golden retriever", "model 3"]
    assert read(tmp_path, "model 3\nmodel 1\n", known=())[0] == ["model 3", "model 1"]
    assert read(tmp_path, "n01 tench, Tinca\nn02 goldfish\n", known=())[0] == ["n01", "n02"]
    assert read(tmp_path, "0\n1\n2\n", known=["0", "1"])[0] == ["0", "1", "2"]
    assert read(tmp_path, "class\nname\nant\n", known=["class", "name", "ant"])[0] == ["class", "name", "ant"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("polar bear\n\nant\n", ("line 2", "is empty")),
        ("\npolar bear\nant\n", ("line 1", "is empty")),
        ("ant,x\nant,y\n", ("'ant'", "twice")),
        ("0,polar bear\n1,ant\n5,Löwe\n", ("0 to 5", "0 to 2")),
        ("a\0b", ("not a text file",)),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, text, words):
    with refused("--classes", "classes.txt", *words, error=ShardError):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Idx,Name", "2,second", "0,zeroth", "1,first"], ["zeroth", "first", "second"]),
        (["Idx\tRatio\tName", "2\t.1\tsky", "1\t.2\twall;brick wall"], ["wall;brick wall", "sky"]),
        (["Name,color", "b,1", "a,2"], ["b", "a"]),
        (["id,name", "n02,b", "n01,a"], ["b", "a"]),  # no numbers
        (["Idx,Name", "1,a", "3,b"], "3"),
        (["Idx,Name", "1,door", "2,door"], "door"),
        (["Name,color", "x,1", ",3"], "without a name"),
    ],
)
def test_a_table_s_names_are_in_the_order_of_its_numbers(tmp_path, lines, expected):
    path = tmp_path / "table.txt"
    path.write_text("\n".join(lines) + "\n")
    if isinstance(expected, list):
        assert read_class_names(path, "--maps") == expected
    else:
        with refused("--maps", expected, error=ShardError):
            read_class_names(path, "--maps")
