"""Annotation files with faults: one line each, with file, row and field; and files that only look odd."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.annotations import Columns, Row, evaluation_rows, read_csv, read_json, training_rows
from lavis_dcd.datasets.coco_captions import read_coco
from lavis_dcd.datasets.image_text_retrieval import ImageTextRetrievalBuilder, OwnDataInfo
from lavis_dcd.datasets.splits import check_annotations

COLUMNS = Columns("image", "caption", "split")
UTF16 = "it is UTF-16 text or no text; save it as UTF-8"


def _faults(read: Callable, *args: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*args)
    return caught.value.faults


def _written(folder: Path, content: Any) -> Path:
    file = folder / "c"
    raw = content if isinstance(content, str | bytes) else json.dumps(content)
    file.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8"))
    return file


# -- JSON: the whole file ----------------------------------------------------------------------------------------

LIST = 'expected a list of {"image": ..., "caption": ...} rows'
WHOLE: dict[str, tuple[Any, str]] = {
    "empty file": ("", "{file}: is empty"),
    "blank file": (" \n\t\n", "{file}: is empty"),
    "no JSON": ("image: a.jpg", "{file}: not readable as JSON: Expecting value: line 1 column 1 (char 0)"),
    "cut short": (
        '[{"image": "a.jpg", "capt',
        "{file}: not readable as JSON: Unterminated string starting at: line 1 column 21 (char 20)",
    ),
    "comma after the last row": (
        '[{"image": "a.jpg", "caption": "c"},\n]',
        "{file}: not readable as JSON: Expecting value: line 2 column 1 (char 37)",
    ),
    "one object a line": (
        '{"image": "a.jpg", "caption": "c"}\n{"image": "b.jpg", "caption": "c"}\n',
        "{file}: not readable as JSON: Extra data: line 2 column 1 (char 35)",
    ),
    "nested without end": ("[" * 100_000, "{file}: not readable as JSON: nested too deeply"),
    "an object": ({"a.jpg": "c"}, f"{{file}}: holds an object, {LIST}"),
    "text": ('"a.jpg"', f"{{file}}: holds text, {LIST}"),
    "null": ("null", f"{{file}}: holds null, {LIST}"),
    "a number": ("NaN", f"{{file}}: holds NaN, {LIST}"),
    "an empty list": ("[]", "{file}: the list is empty"),
    "Latin-1": (
        '[\n{"image": "a.jpg", "caption": "café"}]'.encode("latin-1"),
        "{file}: not readable as JSON: byte 0xe9 in line 2 is not UTF-8; save the file as UTF-8",
    ),
    "UTF-16": ("[]".encode("utf-16"), f"{{file}}: not readable as JSON: {UTF16}"),
    "UTF-16 without a mark": ("[1]".encode("utf-16-le"), f"{{file}}: not readable as JSON: {UTF16}"),
    "UTF-32": ("[1]".encode("utf-32-be"), f"{{file}}: not readable as JSON: {UTF16}"),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0", "{file}: not readable as JSON: byte 0x89 in line 1 is not UTF-8; "
                                            "save the file as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_json_files(tmp_path, name):
    content, message = WHOLE[name]
    file = _written(tmp_path, content)
    assert _faults(read_json, file, tmp_path) == [message.replace("{file}", str(file))]


def test_files_that_are_not_there_or_folders(tmp_path):
    assert _faults(read_json, tmp_path / "no", tmp_path) == [f"{tmp_path}/no: does not exist"]
    assert _faults(read_json, tmp_path, tmp_path) == [f"{tmp_path}: is a folder, expected a JSON file"]
    assert _faults(read_csv, tmp_path, tmp_path, COLUMNS) == [f"{tmp_path}: is a folder, expected a CSV file"]
    below = _written(tmp_path, "x") / "y"
    assert _faults(read_json, below, tmp_path) == [f"{below}: does not exist"]
    long = tmp_path / ("n" * 300)
    assert _faults(read_json, long, tmp_path) == [f"{long}: not readable: File name too long"]


@pytest.mark.usefixtures("permissions_count")
def test_no_permission(tmp_path):
    file = _written(tmp_path, [])
    file.chmod(0)
    assert _faults(read_json, file, tmp_path) == [f"{file}: not readable: Permission denied"]


# -- JSON: its rows ----------------------------------------------------------------------------------------------

OUT = "is not inside {root}; set root to a folder above all pictures"
TEXTS = "expected text or a list of texts"
ROWS: dict[str, tuple[Any, str]] = {
    "text": ("a.jpg", "text, expected an object with image and caption"),
    "null": (None, "null, expected an object with image and caption"),
    "a list": (["a.jpg", "c"], "a list, expected an object with image and caption"),
    "no image": ({"caption": "c"}, "image missing (has caption)"),
    "no caption": ({"image": "a.jpg", "captions": "c"}, "caption missing (has image, captions)"),
    "nothing": ({}, "image and caption missing (has nothing)"),
    "image null": ({"image": None, "caption": "c"}, "image: null, expected a path"),
    "image a number": ({"image": 7, "caption": "c"}, "image: a number, expected a path"),
    "image NaN": ({"image": float("nan"), "caption": "c"}, "image: NaN, expected a path"),
    "image empty": ({"image": " ", "caption": "c"}, "image: empty"),
    "image above the root": ({"image": "../a.jpg", "caption": "c"}, f"image: '../a.jpg' {OUT}"),
    "image out and elsewhere": ({"image": "x/../../y/a.jpg", "caption": "c"}, f"image: 'x/../../y/a.jpg' {OUT}"),
    "image elsewhere": ({"image": "/etc/passwd", "caption": "c"}, f"image: '/etc/passwd' {OUT}"),
    "image the root": ({"image": "x/..", "caption": "c"}, f"image: 'x/..' {OUT}"),
    "image with a zero byte": (
        {"image": "a.jpg\0.png", "caption": "c"},
        r"image: 'a.jpg\x00.png' holds a character that no file's name can have",
    ),
    "image with half a character": (
        {"image": "\ud800.jpg", "caption": "c"},
        r"image: '\ud800.jpg' holds a character that no file's name can have",
    ),
    "caption empty": ({"image": "a.jpg", "caption": ""}, "caption: empty"),
    "caption of white space": ({"image": "a.jpg", "caption": "\t\n\u00a0"}, "caption: empty"),
    "caption of marks": (
        {"image": "a.jpg", "caption": "\u200f\0\u202e"},
        r"caption: '\u200f\x00\u202e' holds nothing that can be seen",
    ),
    "caption null": ({"image": "a.jpg", "caption": None}, f"caption: null, {TEXTS}"),
    "caption a number": ({"image": "a.jpg", "caption": 3}, f"caption: a number, {TEXTS}"),
    "caption NaN": ({"image": "a.jpg", "caption": float("nan")}, f"caption: NaN, {TEXTS}"),
    "caption Infinity": ({"image": "a.jpg", "caption": float("inf")}, f"caption: Infinity, {TEXTS}"),
    "caption true": ({"image": "a.jpg", "caption": True}, f"caption: true/false, {TEXTS}"),
    "caption an object": ({"image": "a.jpg", "caption": {"en": "c"}}, f"caption: an object, {TEXTS}"),
    "captions of lists": ({"image": "a.jpg", "caption": [["c"]]}, f"caption: a list, {TEXTS}"),
    "captions one null": ({"image": "a.jpg", "caption": ["c", None]}, f"caption: null, {TEXTS}"),
    "captions one empty": ({"image": "a.jpg", "caption": ["c", ""]}, "caption: empty"),
    "captions none": ({"image": "a.jpg", "caption": []}, "caption: an empty list"),
    "caption with half a character": (
        {"image": "a.jpg", "caption": "a \ud83d dog"},
        r"caption: holds '\ud83d', half of a character; write it again from its source",
    ),
    "id a fraction": ({"image": "a.jpg", "caption": "c", "image_id": 1.5},
                      "image_id: a number, expected text or an integer"),
    "id NaN": ({"image": "a.jpg", "caption": "c", "image_id": float("nan")},
               "image_id: NaN, expected text or an integer"),
    "id true": ({"image": "a.jpg", "caption": "c", "image_id": True},
                "image_id: true/false, expected text or an integer"),
    "id a list": ({"image": "a.jpg", "caption": "c", "image_id": [1]},
                  "image_id: a list, expected text or an integer"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_json_rows(tmp_path, name):
    row, message = ROWS[name]
    file = _written(tmp_path, [{"image": "b.jpg", "caption": "fine"}, row])
    assert _faults(read_json, file, tmp_path) == [f"{file}, row 1: {message.replace('{root}', str(tmp_path))}"]


def test_all_faults_come_at_once_up_to_twenty_and_a_count(tmp_path):
    file = _written(tmp_path, [row for row, _ in ROWS.values()])
    lines = _faults(read_json, file, tmp_path)
    assert len(lines) == 21 and lines[20] == f"{file}: {len(ROWS) - 20} more faults"
    assert [line.split(": ")[0] for line in lines[:20]] == [f"{file}, row {number}" for number in range(20)]


def test_a_picture_with_two_ids(tmp_path):
    rows = [{"image": "a\nb.jpg", "caption": "c", "image_id": i} for i in (1, "1")]
    file = _written(tmp_path, rows)
    assert _faults(read_json, file, tmp_path) == [rf"{file}, a\nb.jpg: has two image_ids, 1 and '1'"]


def test_a_picture_with_two_ids_in_two_files(tmp_path):
    for name, image_id in (("a.json", 1), ("b.json", 2)):
        (tmp_path / name).write_text(json.dumps([{"image": "x.jpg", "caption": "c", "image_id": image_id}]))
    info = OwnDataInfo(root=str(tmp_path), annotations={"train": ["a.json", "b.json"]})
    assert _faults(ImageTextRetrievalBuilder.read, None, info) == [
        f"{tmp_path}/b.json, x.jpg: has image_id 2 here and 1 in {tmp_path}/a.json; give it one, or none"
    ]


def test_pictures_that_share_an_id_are_told(tmp_path, caplog):
    file = _written(tmp_path, [{"image": f"{name}.jpg", "caption": "c", "image_id": 7} for name in "ab"])
    with caplog.at_level(logging.WARNING):
        assert [row.image for row in read_json(file, tmp_path)] == ["a.jpg", "b.jpg"]
    assert caplog.messages == [
        f"{file}: 1 image_ids stand for several pictures each, as 7 for 'a.jpg' and 'b.jpg'; they count as one "
        "picture, whose captions are never each other's negatives"
    ]


def test_a_picture_in_two_splits_is_told(tmp_path, caplog):
    sets = {split: SimpleNamespace(vis_root="/d", annotation=[{"image": "a.jpg"}]) for split in ("train", "test")}
    with caplog.at_level(logging.WARNING):
        check_annotations(sets)
    assert caplog.messages == [
        "1 pictures are in both train and test: /d/a.jpg; take them out of one, or test measures what was trained on"
    ]


def test_odd_json_that_is_read(tmp_path):
    raw = '\ufeff[{"image": " ./a.jpg ", "caption": ["c", "c"], "score": NaN, "size": Infinity, "image_id": null}]\r\n'
    assert read_json(_written(tmp_path, raw), tmp_path) == [Row("a.jpg", "c", "a.jpg")] * 2


# -- CSV ---------------------------------------------------------------------------------------------------------

HEAD = "image,caption,split\n"
CSV: dict[str, tuple[Any, str]] = {
    "empty": ("", "{file}: is empty"),
    "blank": ("\n\n", "{file}: is empty"),
    "blank cells only": (",,\n,,\n", "{file}: is empty"),
    "a header only": (HEAD, "{file}: has a header and no rows"),
    "no header": ("a.jpg,c,train\n", "{file}: no column image, caption, split; it has a.jpg, c, train"),
    "semicolons": (
        "image;caption;split\na.jpg;c;train\n",
        "{file}: no column image, caption, split; it has image;caption;split; separate the cells by commas",
    ),
    "tabs": (
        "image\tcaption\tsplit\na.jpg\tc\ttrain\n",
        r"{file}: no column image, caption, split; it has image\tcaption\tsplit; separate the cells by commas",
    ),
    "a column twice": (
        "image,caption,split,caption\na.jpg,c,train,d\n",
        "{file}: the header names caption more than once; rename the other columns",
    ),
    "a cell too many": (
        HEAD + "a.jpg,one, two,train\n",
        "{file}, line 2: 4 cells, the header has 3 (quote captions that hold commas)",
    ),
    "a cell too few": (
        HEAD + "a.jpg,c\n", "{file}, line 2: 2 cells, the header has 3 (quote captions that hold commas)",
    ),
    "an open quote": (HEAD + 'a.jpg,"c,train\n', "{file}: not readable as CSV after line 1: unexpected end of data"),
    "a stray quote": (
        HEAD + 'a.jpg,"a "big" dog",train\n', "{file}: not readable as CSV after line 1: ',' expected after '\"'",
    ),
    "an endless cell": (
        HEAD + f"a.jpg,{'c' * 200_000},train\n",
        "{file}: not readable as CSV after line 1: field larger than field limit (131072)",
    ),
    "no picture": (HEAD + ",c,train\n", "{file}, line 2: image: empty"),
    "no caption": (HEAD + "a.jpg, ,train\n", "{file}, line 2: caption: empty"),
    "an unknown split": (HEAD + "a.jpg,c,eval\n", "{file}, line 2: split: 'eval' is not one of train, val, test"),
    "no split": (HEAD + "a.jpg,c,\n", "{file}, line 2: split: '' is not one of train, val, test"),
    "a picture elsewhere": (
        HEAD + "/etc/a.jpg,c,val\n", "{file}, line 2: image: '/etc/a.jpg' " + OUT,
    ),
    "Latin-1": (
        (HEAD + "a.jpg,café,val\n").encode("latin-1"),
        "{file}: not readable as CSV: byte 0xe9 in line 2 is not UTF-8; save the file as UTF-8",
    ),
    "UTF-16": (HEAD.encode("utf-16"), f"{{file}}: not readable as CSV: {UTF16}"),
    "a spreadsheet": (b"PK\x03\x04\x14\0\x06\0", "{file}: no column image, caption, split; it has "
                                                "PK\\x03\\x04\\x14\\x00\\x06\\x00"),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_csv_files(tmp_path, name):
    content, message = CSV[name]
    file = _written(tmp_path, content)
    expected = message.replace("{file}", str(file)).replace("{root}", str(tmp_path))
    assert _faults(read_csv, file, tmp_path, COLUMNS) == [expected]


def test_odd_csv_that_is_read(tmp_path):
    raw = '\ufeff image ,caption,split,more\r\n"a.jpg", "two\r\nlines ""quoted""", TRAIN ,\r\n\r\n'
    assert read_csv(_written(tmp_path, raw), tmp_path, COLUMNS) == [
        ("train", Row("a.jpg", 'two\r\nlines "quoted"', "a.jpg"))
    ]


# -- COCO --------------------------------------------------------------------------------------------------------

IMAGE, CAPTION = {"id": 1, "file_name": "a.jpg"}, {"id": 5, "image_id": 1, "caption": "c"}


def _coco(images: Any = (IMAGE,), annotations: Any = (CAPTION,)) -> dict[str, Any]:
    return {"images": list(images), "annotations": list(annotations)}


COCO: dict[str, tuple[Any, str]] = {
    "a list": ([], "{file}: not in COCO's format: it holds a list, expected an object with images and annotations"),
    "nothing": ({}, "{file}: not in COCO's format: no list of images and annotations"),
    "images an object": ({"images": {}, "annotations": []}, "{file}: not in COCO's format: no list of images"),
    "boxes": (
        _coco(annotations=[{"id": 5, "image_id": 1, "bbox": []}]),
        "{file}: is no caption file of COCO's (annotations.caption missing); expected one such as "
        "captions_val2017.json",
    ),
    "no captions": (_coco(annotations=[]), "{file}: holds no caption of its pictures"),
    "only empty captions": (
        _coco(annotations=[CAPTION | {"caption": " "}]), "{file}: holds no caption of its pictures",
    ),
    "an image that is text": (
        _coco([IMAGE, "b.jpg"]), "{file}, images[1]: text, expected an object with id, file_name",
    ),
    "an image without a file": (_coco([IMAGE, {"id": 2}]), "{file}, images[1]: file_name missing (has id)"),
    "an image without an id": (_coco([IMAGE, {"file_name": "b"}]), "{file}, images[1]: id missing (has file_name)"),
    "an image's id a list": (
        _coco([IMAGE, {"id": [2], "file_name": "b"}]), "{file}, images[1]: id: a list, expected an integer or text",
    ),
    "an image's id twice": (
        _coco([IMAGE, {"id": 1, "file_name": "b.jpg"}]),
        "{file}, images[1]: id: 1 stands there twice; give each picture an id of its own",
    ),
    "a file elsewhere": (
        _coco([IMAGE, {"id": 2, "file_name": "../../etc/a.jpg"}]),
        "{file}, images[1]: file_name: '../../etc/a.jpg' " + OUT,
    ),
    "a file that is a number": (
        _coco([IMAGE, {"id": 2, "file_name": 2}]), "{file}, images[1]: file_name: a number, expected a path",
    ),
    "a caption's id twice": (
        _coco(annotations=[CAPTION, CAPTION]),
        "{file}, annotations[1]: id: 5 stands there twice; give each caption an id of its own",
    ),
    "a caption of no image": (
        _coco(annotations=[CAPTION, CAPTION | {"id": 6, "image_id": 9}]),
        "{file}, annotations[1]: image_id: 9 is the id of none of the images; put the picture's entry in, or take the "
        "caption out",
    ),
    "a caption of null": (
        _coco(annotations=[CAPTION, CAPTION | {"id": 6, "image_id": None}]),
        "{file}, annotations[1]: image_id: None is the id of none of the images; put the picture's entry in, or take "
        "the caption out",
    ),
    "a caption that is a number": (
        _coco(annotations=[CAPTION, CAPTION | {"id": 6, "caption": 6}]),
        "{file}, annotations[1]: caption: a number, expected text",
    ),
    "a caption that is none": (
        _coco(annotations=[CAPTION, {"id": 6, "image_id": 1}]),
        "{file}, annotations[1]: caption missing (has id, image_id)",
    ),
    "half a character": (
        _coco(annotations=[CAPTION | {"caption": "\udc00"}]),
        r"{file}, annotations[0]: caption: holds '\udc00', half of a character; write it again from its source",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COCO)
def test_coco_files(tmp_path, name):
    content, message = COCO[name]
    file = _written(tmp_path, content)
    expected = message.replace("{file}", str(file)).replace("{root}", str(tmp_path))
    assert _faults(read_coco, file) == [expected]


def test_odd_coco_that_is_read(tmp_path):
    more = {"id": "x", "file_name": "./b.jpg"}, {"id": "k", "image_id": "x", "caption": "d"}
    content = _coco([IMAGE, more[0]], [CAPTION, more[1]])
    file = _written(tmp_path, "\ufeff" + json.dumps(content))
    assert read_coco(file) == [Row("a.jpg", "c", 1), Row("b.jpg", "d", "x")]


# -- anything ----------------------------------------------------------------------------------------------------

NAMES = ["image", "caption", "image_id", "images", "annotations", "id", "file_name"]
KEYS = st.sampled_from(NAMES) | st.text(max_size=4)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["a.jpg", "../x", "/etc", "\ud800", "\0", "a\nb", " ", "."])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some, max_size=4) | st.dictionaries(KEYS, some, max_size=4), max_leaves=12
)
GOOD = [{"image": "a.jpg", "caption": ["x", "y"], "image_id": 3}, {"image": "b.jpg", "caption": "z"}]
TEXTS_OF_FILES = [json.dumps(GOOD).encode(), json.dumps(_coco()).encode(), f"{HEAD}a.jpg,one,train\n".encode()]
SOME = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _try_all(file: Path) -> None:
    _only_faults(lambda: read_csv(file, file.parent, COLUMNS))
    _only_faults(lambda: read_csv(file, file.parent, Columns("image", "caption", None)))
    _only_faults(lambda: read_coco(file))
    _only_faults(lambda: [make(read_json(file, file.parent)) for make in (training_rows, evaluation_rows)])


def _only_faults(read: Callable[[], Any]) -> None:
    try:
        read()
    except UserError as error:
        assert 1 <= len(error.faults) <= 21
        assert all("\n" not in line and len(line) < 1500 for line in error.faults)


@SOME
@given(VALUES)
def test_arbitrary_json(tmp_path, value):
    _try_all(_written(tmp_path, json.dumps(value)))


@SOME
@given(st.data(), st.sampled_from([GOOD, _coco()]))
def test_good_files_with_other_values(tmp_path, with_another_value, data, content):
    for _ in range(data.draw(st.integers(1, 3))):
        content = with_another_value(content, data, VALUES)
    _try_all(_written(tmp_path, json.dumps(content)))


@SOME
@given(st.binary(max_size=60))
def test_arbitrary_bytes(tmp_path, raw):
    _try_all(_written(tmp_path, raw))


@SOME
@given(st.sampled_from(TEXTS_OF_FILES), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2)), min_size=1))
def test_good_files_with_other_bytes(tmp_path, raw, edits):
    for at, new in edits:
        at %= len(raw) + 1
        raw = raw[:at] + new + raw[at + 1 :]
    _try_all(_written(tmp_path, raw))
