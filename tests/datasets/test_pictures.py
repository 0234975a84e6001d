from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.pictures import NAMED, load_picture, verify_pictures


def test_a_set_that_makes_its_pictures_is_asked_for_them():
    made = Image.new("RGB", (3, 2))
    assert load_picture(SimpleNamespace(picture=lambda index: (made, index)), 7) == (made, 7)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_files_come_as_rgb_whatever_their_mode(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "none.png"}, {"image": name}])
    picture = load_picture(dataset, 1)
    assert (picture.mode, picture.size) == ("RGB", (5, 4))


def test_a_missing_or_broken_file_is_a_fault_of_its_name(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "none.png"}, {"image": "broken.png"}])
    for index in range(2):
        with pytest.raises(UserError, match=r"(none|broken)\.png: no readable picture"):
            load_picture(dataset, index)


def test_thumbnails_of_large_photographs_are_decoded_at_a_smaller_scale(tmp_path):
    rows, columns = np.mgrid[:900, :1200]
    waves = [127.5 + 127.5 * np.sin(rows / 90 + columns / period) for period in (50, 70, 110)]
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(tmp_path / "a.jpg", quality=92)
    Image.new("L", (1200, 900)).save(tmp_path / "b.png")
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "a.jpg"}, {"image": "b.png"}])
    whole, scaled = load_picture(dataset, 0), load_picture(dataset, 0, side=160)
    assert whole.size == (1200, 900) and scaled.size == (600, 450) and scaled.mode == "RGB"
    assert load_picture(dataset, 1, side=160).size == (1200, 900)  # other formats have no scales
    for picture in (whole, scaled):
        picture.thumbnail((160, 160))
    assert np.abs(np.asarray(whole, float) - np.asarray(scaled, float)).max() <= 5


def picture(path: Path, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return path


def rows(root: Path, *names: str) -> SimpleNamespace:
    return SimpleNamespace(vis_root=str(root), annotation=[{"image": name} for name in names])


def faults(dataset, mode: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        verify_pictures(dataset, mode)
    return caught.value.faults


@pytest.fixture
def mixed(tmp_path: Path) -> SimpleNamespace:
    """Two sound pictures, one cut short, one that is text, one empty, one missing, one that is a folder."""
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.png")
    cut = picture(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:-900])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    return rows(tmp_path, "a.jpg", "cut.jpg", "gone.jpg", "text.jpg", "empty.jpg", "folder.jpg", "b.png", "a.jpg")


def test_fast_finds_what_is_missing_and_what_is_no_picture(mixed):
    lines = faults(mixed, "fast")
    assert [Path(line.split(": ")[0]).name for line in lines[:-1]] == [
        "gone.jpg", "text.jpg", "empty.jpg", "folder.jpg",
    ]  # fmt: skip
    assert lines[0] == f"{mixed.vis_root}/gone.jpg: missing"
    assert all(": no readable picture (" in line for line in lines[1:-1])
    assert lines[-1].startswith("4 of 7 pictures cannot be read: ")  # a.jpg, named twice, is one picture
    assert "run.verify=off" in lines[-1]


@pytest.mark.parametrize("lenient", [False, True])
def test_full_also_finds_pictures_that_are_cut_short(mixed, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # importing lavis switches it on
    lines = faults(mixed, "full")
    assert lines[0].startswith(f"{mixed.vis_root}/cut.jpg: no readable picture (")
    assert lines[-1].startswith("5 of 7 pictures cannot be read: ")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("progressive", [False, True])
def test_full_reads_a_jpeg_to_its_end_although_it_decodes_an_eighth(tmp_path, progressive, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    whole = tmp_path / "whole.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).resize((600, 400)).save(whole, progressive=progressive)
    raw, names, expected = whole.read_bytes(), [], set()
    for lost in (2, 3, 50, 200, 1000, len(raw) // 4, len(raw) // 2):
        name = f"{lost}.jpg"
        (tmp_path / name).write_bytes(raw[:-lost])
        names.append(name)
        try:
            Image.open(tmp_path / name).load()  # what decoding every pixel finds
        except OSError:
            expected.add(name)
    assert len(expected) >= 4
    found = faults(rows(tmp_path, "whole.jpg", *names), "full")
    assert {Path(line.split(": ")[0]).name for line in found[:-1]} == expected


def test_off_reads_nothing(mixed, caplog):
    assert faults(mixed, "fast")  # the very set that another mode refuses
    caplog.clear()
    with caplog.at_level(logging.INFO, "lavis_dcd.datasets.pictures"):
        assert verify_pictures(mixed, "off") is None
    assert not caplog.messages


def test_sound_pictures_pass_and_are_counted(tmp_path, caplog):
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.png")
    with caplog.at_level(logging.INFO, "lavis_dcd.datasets.pictures"):
        for mode in ("fast", "full"):
            verify_pictures(rows(tmp_path, "a.jpg", "b.png", "b.png"), mode)
    assert caplog.messages == ["2 pictures verified (fast)", "2 pictures verified (full)"]


@pytest.mark.parametrize("extra", [0, 1, 7])
def test_many_faults_are_named_up_to_a_number_and_counted_beyond(tmp_path, extra):
    names = [f"{i}.jpg" for i in range(NAMED + extra)]
    lines = faults(rows(tmp_path, *names), "fast")
    assert lines[:NAMED] == [f"{tmp_path}/{name}: missing" for name in names[:NAMED]]
    assert lines[NAMED:-1] == ([f"... and {extra} more pictures"] if extra else [])
    assert lines[-1].startswith(f"{len(names)} of {len(names)} pictures cannot be read: ")


def test_concatenations_and_wrappers_are_looked_into(tmp_path):
    (tmp_path / "two").mkdir()
    both = SimpleNamespace(datasets=[rows(tmp_path, "a.jpg"), rows(tmp_path / "two", "b.jpg")])
    lines = faults(SimpleNamespace(dataset=both), "fast")
    assert lines[:-1] == [f"{tmp_path}/a.jpg: missing", f"{tmp_path}/two/b.jpg: missing"]


@pytest.mark.parametrize("keys", [{"vis_root": None}, {"vis_root": "", "picture": lambda index: None}])
def test_sets_that_read_no_files_pass(keys, caplog):
    named = [{"image": "x"}]
    assert faults(SimpleNamespace(vis_root="", annotation=named), "full")  # were it a file, it would be missing
    with caplog.at_level(logging.INFO, "lavis_dcd.datasets.pictures"):
        assert verify_pictures(SimpleNamespace(annotation=named, **keys), "full") is None
    assert caplog.messages == ["0 pictures verified (full)"]


def test_an_unknown_mode_is_told():
    with pytest.raises(UserError, match=r"run\.verify: 'quick' is none of fast, full, off"):
        verify_pictures(rows(Path()), "quick")
