"""Class order: classes have the order of the model's outputs for every file format, and ambiguous files are refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from calibration.data.classes import Classes, by_name, natural_key, ordered, read
from models.errors import BadRequest

TWELVE = [str(number) for number in range(1, 13)]
TEXT_ORDER = ("1", "10", "11", "12", "2", "3", "4", "5", "6", "7", "8", "9")
SYNSETS = ("n01440764", "n02102040", "n03000684")


def labels(tmp_path: Path, text: str, name: str = "labels.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# --- Orders ---------------------------------------------------------------------------------------------------------


def test_text_and_natural_order_differ_where_numbers_have_several_lengths() -> None:
    assert ordered(TWELVE, "text") == TEXT_ORDER
    assert ordered(TWELVE, "natural") == tuple(TWELVE)


@pytest.mark.parametrize(
    ("names", "natural"),
    [
        (["class10", "class9", "class1"], ["class1", "class9", "class10"]),
        (["Zebra", "ant", "Bee"], ["ant", "Bee", "Zebra"]),
        (["v1.10", "v1.9", "v1"], ["v1", "v1.9", "v1.10"]),
        (["007", "7", "07"], ["007", "07", "7"]),  # the same number: as text
        (["²", "1", "x"], ["1", "x", "²"]),
    ],
)
def test_natural_order_is_that_of_numbers_and_of_letters_without_case(names: list[str], natural: list[str]) -> None:
    assert sorted(names, key=natural_key) == natural


def test_folders_are_classes_of_their_names() -> None:
    assert by_name(["b", "a"], "text") == Classes(names=("a", "b"), outputs={"a": 0, "b": 1})
    assert by_name(TWELVE, "natural").outputs["2"] == 1


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat\nbig dog\nnewt\n", ("cat", "big dog", "newt")),
        ("\ufeffcat\r\n\r\n# outputs\r\nbig dog\r\nnewt", ("cat", "big dog", "newt")),
        ("newt\ncat\nzebra\nbig dog\n", ("newt", "cat", "zebra", "big dog")),  # more classes than folders
        ("cat\t1\nbig dog\t2\nnewt\t0\n", ("newt", "cat", "big dog")),
        ("cat,1\nbig dog,2\nnewt,0\n", ("newt", "cat", "big dog")),
        ("1\tcat\n2\tbig dog\n0\tnewt\n", ("newt", "cat", "big dog")),
        ("cat,5\nbig dog,2\nnewt,0\n", ("newt", "output 1", "big dog", "output 3", "output 4", "cat")),
        ("cat\t1 a cat\nbig dog\t2 a dog\nnewt\t0 a newt\n", ("a newt", "a cat", "a dog")),
        ('["newt", "cat", "big dog"]', ("newt", "cat", "big dog")),
        ('{"cat": 1, "big dog": 2, "newt": 0}', ("newt", "cat", "big dog")),
        ('{"1": "cat", "2": "big dog", "0": "newt"}', ("newt", "cat", "big dog")),
        ('{"id2label": {"0": "newt", "1": "cat", "2": "big dog"}, "x": 1}', ("newt", "cat", "big dog")),
        ('{"newt": "a newt", "big dog": "a dog", "cat": "a cat"}', ("a newt", "a dog", "a cat")),
    ],
)
def test_a_file_gives_the_outputs_in_their_order(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    folders = ("big dog", "cat", "newt")
    found = read(labels(tmp_path, text), folders)
    assert found.names == names
    plain = {"a newt": "newt", "a dog": "big dog", "a cat": "cat"}
    assert [
        plain.get(found.names[found.outputs[folder]], found.names[found.outputs[folder]]) for folder in folders
    ] == [
        "big dog",
        "cat",
        "newt",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "n02102040 English springer, springer spaniel\nn01440764 tench, Tinca tinca\nn03000684 chain saw\n",
        json.dumps(
            {"0": ["n02102040", "English springer, springer spaniel"], "1": ["n01440764", "tench, Tinca tinca"]}
        )[:-1]
        + ', "2": ["n03000684", "chain saw"]}',
        json.dumps(
            {"n02102040": "English springer, springer spaniel", "n01440764": "tench, Tinca tinca"}
            | {"n03000684": "chain saw"}
        ),
    ],
)
def test_synsets_are_named_by_the_file(tmp_path: Path, text: str) -> None:
    found = read(labels(tmp_path, text), SYNSETS)
    assert found.names == ("English springer, springer spaniel", "tench, Tinca tinca", "chain saw")
    assert found.outputs == {"n01440764": 1, "n02102040": 0, "n03000684": 2}


def test_folders_that_are_numbers_can_be_given_indices_and_names(tmp_path: Path) -> None:
    found = read(labels(tmp_path, "1 2\n2 0\n10 1\n"), ("1", "10", "2"))
    assert found.outputs == {"1": 2, "10": 1, "2": 0} and found.names == ("2", "10", "1")
    found = read(labels(tmp_path, "1 disc\n2 square\n10 stripe\n"), ("1", "10", "2"))
    assert found.outputs == {"1": 0, "10": 2, "2": 1} and found.names == ("disc", "square", "stripe")
    found = read(labels(tmp_path, "1\n2\n10\n"), ("1", "10", "2"))
    assert found.outputs == {"1": 0, "10": 2, "2": 1} and found.names == ("1", "2", "10")


def test_duplicate_class_names_are_made_unique(tmp_path: Path) -> None:
    found = read(labels(tmp_path, "n1 crane\nn2 crane\nn3 newt\n"), ("n1", "n2", "n3"))
    assert found.names == ("crane (0)", "crane (1)", "newt")


def test_the_last_of_many_outputs_takes_no_time(tmp_path: Path) -> None:
    found = read(labels(tmp_path, "cat 0\ndog 99999\n"), ("cat", "dog"))
    assert len(found.names) == 100_000 and found.names[-1] == "dog"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cat\n", "has no class for 1 of 2 folders: dog; it begins with cat"),
        ("", "has no class for 2 of 2 folders: cat, dog; it begins with nothing"),
        (
            "cat\ndog\ncat\n",
            "`cat` (output 0) and `cat` (output 2) are given twice; expected one folder for each output",
        ),
        (
            "cat 0\ndog 0\n",
            "`cat` (output 0) and `dog` (output 0) are given twice; expected one folder for each output",
        ),
        ("cat 1\ndog 2\n", "indices run from 1 to 2; expected from 0, the model's first output"),
        ("cat 2 kit_cat\ndog 1 kit_dog\n", "indices run from 1 to 2; expected from 0, the model's first output"),
        ("cat 0\ndog the dog\n", "`dog the dog` and `cat 0` have different forms; give every folder an index, or none"),
        ("cat 0\ndog 999999999\n", "`dog` has the index 999999999; expected 0 to 99999"),
        ('{"cat": 0, "dog": -1}', "`dog` has the index -1; expected 0 to 99999"),
        ('{"cat": 0, "dog"', "is not JSON: "),
        ('{"cat": true, "dog": 1}', ": expected a list of folders, or an object {folder: index}"),
        ("[1, 2]", ": expected a list of folders, or an object {folder: index}"),
        ("[" * 100_000, "is not JSON: "),
        ("{}", ": expected a list of folders"),
    ],
)
def test_a_file_that_leaves_the_order_open_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(sentence)) as refused:
        read(labels(tmp_path, text), ("cat", "dog"))
    assert str(refused.value).startswith(f"LABELS={tmp_path}/labels.txt")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"cat\n\xff\xfe\n")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**25)
    for name, sentence in {
        "bytes": "is not UTF-8 text (byte 4); expected a list of class names",
        "fifo": ": this is a FIFO, not a file; give `text` or `natural`, or a file with one class per line",
        "missing": ": there is no such file",
        "large": "has more than 16 MiB",
        "x" * 300: ": there is no such file",
    }.items():
        with pytest.raises(BadRequest, match=re.escape(sentence)):
            read(tmp_path / name, ("cat", "dog"))
