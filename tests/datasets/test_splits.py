from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.splits import check_annotations, distinct_image_ids, split_by_picture


def rows(root: str, *pictures: str) -> SimpleNamespace:
    """A training set of one caption per picture; LAVIS numbers the ids of each set from 0."""
    annotation = [{"image": name, "image_id": name} for name in pictures]
    ids = {name: number for number, name in enumerate(dict.fromkeys(pictures))}
    return SimpleNamespace(vis_root=root, annotation=annotation, img_ids=ids)


@pytest.mark.parametrize(
    ("pictures", "val", "test", "sizes"),
    [(10, 0.2, 0.3, (5, 2, 3)), (10, 0.0, 0.0, (10, 0, 0)), (100, 0.001, 0.1, (89, 1, 10)), (3, 0.1, 0.1, (1, 1, 1))],
)
def test_every_picture_is_in_one_split_of_the_size_asked_for(pictures, val, test, sizes):
    names = [f"{i}.jpg" for i in range(pictures)]
    found = split_by_picture(names, val, test, seed=0)
    assert set(found) == set(names)
    assert tuple(list(found.values()).count(split) for split in ("train", "val", "test")) == sizes


def test_order_and_repetition_change_nothing_and_the_seed_does():
    names = [f"{i}.jpg" for i in range(40)]
    found = split_by_picture(names, 0.2, 0.2, seed=0)
    assert split_by_picture([*reversed(names), *names], 0.2, 0.2, seed=0) == found
    assert split_by_picture(names, 0.2, 0.2, seed=1) != found


def test_too_few_pictures():
    with pytest.raises(UserError, match=r"2 pictures are too few for val_fraction=0\.1 and test_fraction=0\.1"):
        split_by_picture(["a", "b"], 0.1, 0.1, seed=0)


def test_pictures_in_two_splits_are_warned_of_by_their_files(caplog):
    datasets = {
        "train": rows("/d", "a.jpg", "x/b.jpg", "c.jpg", "e.jpg", "f.jpg"),
        "val": rows("/d/x", "b.jpg", "c.jpg"),
        "test": rows("/d", "./a.jpg", "c.jpg", "e.jpg", "f.jpg"),
    }
    with caplog.at_level(logging.WARNING):
        lines = check_annotations(datasets)
    assert (
        lines
        == caplog.messages
        == [
            "1 pictures are in both train and val: /d/x/b.jpg; take them out of one, or val measures what was "
            "trained on",
            "4 pictures are in both train and test: /d/a.jpg, /d/c.jpg, /d/e.jpg, ...; take them out of one, or test "
            "measures what was trained on",
        ]
    )


def test_one_picture_under_two_names_is_warned_of(tmp_path, caplog):
    (tmp_path / "other").mkdir()
    for name in ("a.jpg", "other/z.jpg", "other/y.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"different" if name == "b.jpg" else b"one thing")
    sets = {"train": rows(str(tmp_path), "a.jpg", "b.jpg"), "test": rows(str(tmp_path / "other"), "z.jpg", "y.jpg")}
    with caplog.at_level(logging.WARNING):
        lines = check_annotations(sets)
    assert (
        lines
        == caplog.messages
        == [
            f"2 pictures of test are in train under other names: {tmp_path}/other/y.jpg (there {tmp_path}/a.jpg), "
            f"{tmp_path}/other/z.jpg (there {tmp_path}/a.jpg); take them out of one, or test measures what was "
            "trained on"
        ]
    )
    assert check_annotations(sets, contents=False) == []


def test_drawn_pictures_are_no_files(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    drawn = {split: rows("", name) for split, name in (("train", "a"), ("val", "b"))}
    assert len(check_annotations(drawn)) == 1
    for dataset in drawn.values():
        dataset.picture = lambda index: None
    assert check_annotations(drawn) == []


def test_sets_side_by_side_get_distinct_numbers_and_a_shared_file_keeps_one():
    one, two = rows("/d", "a.jpg", "a.jpg", "b.jpg"), rows("/e", "a.jpg", "../d/b.jpg")
    no_ids = SimpleNamespace(annotation=[{"image": "z"}])
    wrapped = SimpleNamespace(dataset=two)
    for _ in range(2):
        distinct_image_ids([one, wrapped, no_ids])
        assert one.img_ids["b.jpg"] == two.img_ids["../d/b.jpg"]
        assert len({one.img_ids["a.jpg"], one.img_ids["b.jpg"], two.img_ids["a.jpg"]}) == 3


def test_files_under_one_image_id_share_a_number():
    crops = SimpleNamespace(
        vis_root="/d", img_ids={"p": 0},
        annotation=[{"image": "p_left.jpg", "image_id": "p"}, {"image": "p_right.jpg", "image_id": "p"}],
    )  # fmt: skip
    other = rows("/d", "q.jpg")
    distinct_image_ids([crops, other])
    assert set(crops.img_ids) == {"p"} and crops.img_ids["p"] != other.img_ids["q.jpg"]
