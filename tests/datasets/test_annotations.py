from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.annotations import (
    Columns,
    Row,
    csv_header,
    evaluation_rows,
    place,
    read_csv,
    read_json,
    training_rows,
)

COLUMNS = Columns("image", "caption", "split")


def _json(folder: Path, content) -> Path:
    file = folder / "captions.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def _csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    file = folder / "captions.csv"
    file.write_text(text, encoding=encoding)
    return file


def _faults(read, *args) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*args)
    return caught.value.faults


# -- JSON ----------------------------------------------------------------------------------------------------


def test_json_rows_one_per_caption_or_with_lists(tmp_path):
    file = _json(tmp_path, [
        {"image": "a/b.jpg", "caption": "one"},
        {"image": "./a//b.jpg", "caption": ["two", "three"]},
        {"image": "c.jpg", "caption": "four", "image_id": 7, "other": None},
        {"image": str(tmp_path / "d.jpg"), "caption": "five", "image_id": "x"},
    ])  # fmt: skip
    assert read_json(file, tmp_path) == [
        Row("a/b.jpg", "one", "a/b.jpg"),
        Row("a/b.jpg", "two", "a/b.jpg"),
        Row("a/b.jpg", "three", "a/b.jpg"),
        Row("c.jpg", "four", 7),
        Row("d.jpg", "five", "x"),
    ]


def test_json_file_faults(tmp_path):
    assert _faults(read_json, tmp_path / "no.json", tmp_path) == [f"{tmp_path / 'no.json'}: does not exist"]
    assert "not readable as JSON" in _faults(read_json, _json(tmp_path, "{oops"), tmp_path)[0]
    assert "an object, expected a list" in _faults(read_json, _json(tmp_path, {"a": 1}), tmp_path)[0]
    assert "the list is empty" in _faults(read_json, _json(tmp_path, []), tmp_path)[0]


def test_json_row_faults_are_told_all_at_once_with_their_rows(tmp_path):
    file = _json(tmp_path, [
        {"image": "a.jpg", "caption": "fine"},
        "text",
        {"caption": "no picture"},
        {},
        {"image": "a.jpg", "caption": 3},
        {"image": "a.jpg", "caption": ["fine", " "]},
        {"image": "a.jpg", "caption": []},
        {"image": "../secret.jpg", "caption": "c"},
        {"image": "/etc/x.jpg", "caption": "c"},
        {"image": "", "caption": "c"},
        {"image": 5, "caption": "c"},
        {"image": "b.jpg", "caption": "c", "image_id": 1.5},
        {"image": ".", "caption": "c"},
    ])  # fmt: skip
    lines = _faults(read_json, file, tmp_path)
    wanted = {
        1: "text, expected an object", 2: "image missing (has caption)", 3: "image and caption missing (has nothing)",
        4: "caption: a number", 5: "caption: empty", 6: "caption: an empty list", 7: "is not inside",
        8: "is not inside", 9: "image: empty", 10: "image: a number", 11: "image_id: a number", 12: "is not inside",
    }  # fmt: skip
    assert len(lines) == len(wanted)
    for line, (row, what) in zip(lines, wanted.items(), strict=True):
        assert line.startswith(f"{file}, row {row}: ") and what in line


def test_many_faults_are_counted(tmp_path):
    lines = _faults(read_json, _json(tmp_path, [{}] * 50), tmp_path)
    assert len(lines) == 21 and lines[-1].endswith("30 more faults")


def test_a_picture_with_two_ids_is_a_fault(tmp_path):
    rows = [{"image": "a.jpg", "caption": "c", "image_id": i} for i in (1, 2)]
    assert "two image_ids, 1 and 2" in _faults(read_json, _json(tmp_path, rows), tmp_path)[0]


# -- CSV -----------------------------------------------------------------------------------------------------


def test_csv_rows(tmp_path):
    file = _csv(tmp_path, 'image,caption,split\na.jpg,"one, two",train\n\nb.jpg, three ,Validation\nb.jpg,four,dev\n')
    assert read_csv(file, tmp_path, COLUMNS) == [
        ("train", Row("a.jpg", "one, two", "a.jpg")),
        ("val", Row("b.jpg", "three ", "b.jpg")),
        ("val", Row("b.jpg", "four", "b.jpg")),
    ]


def test_csv_of_other_columns_without_split_and_with_a_byte_order_mark(tmp_path):
    file = _csv(tmp_path, "photo,n,words\na.jpg,1,one\n", "utf-8-sig")
    assert csv_header(file) == ["photo", "n", "words"]
    assert read_csv(file, tmp_path, Columns("photo", "words", None)) == [(None, Row("a.jpg", "one", "a.jpg"))]


def test_csv_file_faults(tmp_path):
    assert _faults(read_csv, tmp_path / "no.csv", tmp_path, COLUMNS) == [f"{tmp_path / 'no.csv'}: does not exist"]
    assert "is empty" in _faults(read_csv, _csv(tmp_path, "\n"), tmp_path, COLUMNS)[0]
    assert "no rows" in _faults(read_csv, _csv(tmp_path, "image,caption,split\n"), tmp_path, COLUMNS)[0]
    line = _faults(read_csv, _csv(tmp_path, "picture,caption\na,b\n"), tmp_path, COLUMNS)[0]
    assert line.endswith("no column image, split; it has picture, caption")
    assert "not readable as CSV" in _faults(read_csv, _csv(tmp_path, 'image,caption\n"a,b\n'), tmp_path, COLUMNS)[0]
    quoted = _csv(tmp_path, 'image,caption,split\na.jpg,"two\nlines",train\na.jpg,"a "big" dog",train\n')
    assert "not readable as CSV after line 3: " in _faults(read_csv, quoted, tmp_path, COLUMNS)[0]
    latin = _csv(tmp_path, "image,caption,split\na.jpg,caf\xe9,train\n", "latin-1")
    assert "not readable as CSV" in _faults(read_csv, latin, tmp_path, COLUMNS)[0]


def test_csv_row_faults_name_their_lines(tmp_path):
    rows = ["a.jpg,one,train", ",two,train", "b.jpg,,train", "c.jpg,a,b,train", "../d.jpg,d,train", "e.jpg,e,x"]
    file = _csv(tmp_path, "\n".join(["image,caption,split", *rows]) + "\n")
    lines = _faults(read_csv, file, tmp_path, COLUMNS)
    wanted = {3: "image: empty", 4: "caption: empty", 5: "4 cells, the header has 3", 6: "is not inside",
              7: "split: 'x' is not one of train, val, test"}  # fmt: skip
    assert len(lines) == len(wanted)
    for line, (number, what) in zip(lines, wanted.items(), strict=True):
        assert line.startswith(f"{file}, line {number}: ") and what in line


# -- rows and places -----------------------------------------------------------------------------------------


def test_rows_for_training_and_evaluation():
    rows = [Row("a", "1", 9), Row("b", "2", "b"), Row("a", "3", 9)]
    assert training_rows(rows)[2] == {"image": "a", "caption": "3", "image_id": 9}
    assert evaluation_rows(rows) == [
        {"image": "a", "caption": ["1", "3"], "image_id": 9},
        {"image": "b", "caption": ["2"], "image_id": "b"},
    ]


def test_place_prefers_the_root_then_the_current_folder(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    root.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "f.json").touch()
    assert place("f.json", str(root)) == here / "f.json"
    (root / "f.json").touch()
    assert place("f.json", str(root)) == root / "f.json"
    assert place("f.json", None) == here / "f.json"
    assert place(str(here / "f.json"), str(root)) == here / "f.json"
