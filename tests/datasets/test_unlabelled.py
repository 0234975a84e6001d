"""Pictures without captions and texts without pictures: every form that is read, and every fault with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.unlabelled import read_pictures, read_texts


def written(folder: Path, name: str, content: Any) -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_a_folder_gives_its_pictures_by_name_and_nothing_else(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("b.png", "a.JPG", "deep/c.webp", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    written(tmp_path, "captions.csv", "image,caption")
    written(tmp_path, ".e.png", "")
    assert read_pictures(tmp_path, tmp_path) == ["a.JPG", "b.png", "deep/c.webp"]
    assert read_pictures(tmp_path / "deep", tmp_path) == ["deep/c.webp"]
    assert "1 files are left out" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        [{"image": "a.png", "caption": "x"}, {"image": "a.png", "caption": "y"}, {"image": "deep/../b.png"}],
        ["a.png", "b.png", "a.png"],
        {"images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}], "annotations": []},
    ],
)
def test_json_names_pictures_each_once_in_its_order(tmp_path, content):
    assert read_pictures(written(tmp_path, "p.json", content), tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"caption": "x"}, 3], ["row 0: an object, expected a path or an object with image", "row 1: a number"]),
        ([{"image": "../a.png"}], ["row 0: image: '../a.png' is not inside"]),
        ({"images": [{"id": 1}]}, ["images 0: an object, expected a path or an object with file_name"]),
        ({"pictures": []}, ["holds no list of pictures"]),
        ([], ["holds no picture"]),
        ("{", ["not readable as JSON"]),
    ],
)
def test_faults_of_pictures(tmp_path, content, words):
    with pytest.raises(UserError) as caught:
        read_pictures(written(tmp_path, "p.json", content), tmp_path)
    assert len(caught.value.faults) == len(words)
    for line, expected in zip(caught.value.faults, words, strict=True):
        assert expected in line and "p.json" in line


def test_a_folder_inside_that_cannot_be_read_is_told(tmp_path, permissions_count):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="closed: not readable as a folder: Permission denied"):
        read_pictures(tmp_path, tmp_path)


def test_an_empty_folder_holds_no_picture(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        read_pictures(tmp_path, tmp_path)


COCO = {
    "images": [{"id": 7, "file_name": "gone.jpg"}, {"id": 3, "file_name": "3.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "late"},
        {"id": 2, "image_id": 3, "caption": "early"},
        {"id": 0, "image_id": 7, "caption": " "},
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.txt", "\ufeffa dog\n\n two  cats \r\na dog\n", ["a dog", "two  cats", "a dog"]),
        ("t.json", ["a dog", "a dog"], ["a dog", "a dog"]),
        ("t.json", [{"image": "a.png", "caption": ["one", "two"]}, {"caption": "three"}], ["one", "two", "three"]),
        ("t.json", COCO, ["early", "late"]),
    ],
)
def test_texts_come_in_their_order_and_as_often_as_they_stand_there(tmp_path, name, content, expected):
    assert read_texts(written(tmp_path, name, content)) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.json", ["a", 3, {"image": "a.png"}], ["row 1: text: a number", "row 2: text: null"]),
        ("t.json", [{"caption": ["a", ""]}], ["row 0: text: empty"]),
        ("t.json", "3", ["holds a number, expected a list of texts"]),
        ("t.json", [], ["holds no text"]),
        ("t.json", {"images": []}, ["no list of annotations"]),
        ("t.txt", "a\n\u200e\nb", ["line 2: text: "]),
        ("t.txt", "\n \n", ["is empty"]),
    ],
)
def test_faults_of_texts(tmp_path, name, content, words):
    with pytest.raises(UserError) as caught:
        read_texts(written(tmp_path, name, content))
    assert len(caught.value.faults) == len(words)
    for line, expected in zip(caught.value.faults, words, strict=True):
        assert expected in line and name in line
