"""Manifests: what is told apart, and every way in which stored files may differ from what was written."""

import json
import os

import pytest

from lavis_dcd.common.manifest import MANIFEST, AbsentError, DamagedError, FileRecord, Identity, Manifest, digest_of

IDENTITY = Identity({"the teacher": "a" * 64}, {"train": "b" * 64}, {"train": "c" * 64})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scores.bin").write_bytes(b"scores" * 100)
    (tmp_path / "rows.bin").write_bytes(b"rows")
    files = ["scores.bin", "rows.bin"]
    Manifest.of(tmp_path, files, kind="bank", format=3, identity=IDENTITY, facts={"rows": 7}).write(tmp_path)
    return tmp_path


def read(folder):
    return Manifest.read(folder, "bank", 3)


def test_what_was_written_is_read_and_the_files_are_as_it_says(folder):
    manifest = read(folder)
    assert (manifest.identity, manifest.facts) == (IDENTITY, {"rows": 7})
    assert manifest.files["rows.bin"] == FileRecord.of(folder / "rows.bin")
    manifest.check_files(folder)


def test_a_folder_without_a_manifest_was_not_finished(tmp_path):
    with pytest.raises(AbsentError, match=r"manifest\.json is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(b"scores" * 99), "scores.bin is cut short \\(594 of 600 bytes\\)"),
        (lambda path: path.write_bytes(b"scores" * 101), "scores.bin has 606 bytes, 600 were written"),
        (lambda path: path.write_bytes(b"Scores" + b"scores" * 99), "the checksum of scores.bin does not fit it"),
        (lambda path: path.unlink(), "scores.bin is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "scores.bin is no file"),
        (lambda path: path.symlink_to(path.rename(path.with_name("x"))), "scores.bin is no file"),
    ],
)
def test_a_changed_file_is_named(folder, change, words):
    change(folder / "scores.bin")
    with pytest.raises(DamagedError, match=words):
        read(folder).check_files(folder)


def test_sizes_alone_do_not_tell_changed_bytes(folder):
    (folder / "rows.bin").write_bytes(b"ROWS")
    read(folder).check_files(folder, contents=False)


def test_every_cut_of_a_manifest_is_damage(folder):
    whole = (folder / MANIFEST).read_bytes()
    for length in range(len(whole)):
        (folder / MANIFEST).write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            read(folder)


def test_every_changed_value_in_a_manifest_is_damage(folder):
    content = json.loads((folder / MANIFEST).read_text())
    for key in content:
        (folder / MANIFEST).write_text(json.dumps({**content, key: "x"}))
        with pytest.raises(DamagedError):
            read(folder)
        (folder / MANIFEST).write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(DamagedError):
            read(folder)


@pytest.mark.parametrize(
    "files", [{"../scores.bin": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {}}, {"": {}}, [], "x"]
)
def test_a_manifest_made_up_with_its_checksum_names_files_of_its_folder_only(folder, files):
    content = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items() if k != "sha256"} | {"files": files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digest_of(content), **content}))
    with pytest.raises(DamagedError, match="form"):
        read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"scores.bin": {"bytes": "600", "sha256": "a"}}},
        {"files": {"scores.bin": {"bytes": 600, "sha256": None}}},
        {"files": {"scores.bin": {"bytes": True, "sha256": "a"}}},
        {"identity": {"rows": 5}},
        {"identity": {"settings": {"the teacher": 5}}},
        {"identity": {"pictures": ["a"]}},
        {"facts": 5},
    ],
)
def test_values_of_other_types_under_a_checksum_that_fits_are_damage(folder, change):
    content = {k: v for k, v in json.loads((folder / MANIFEST).read_text()).items() if k != "sha256"} | change
    (folder / MANIFEST).write_text(json.dumps({"sha256": digest_of(content), **content}))
    with pytest.raises(DamagedError, match="form"):
        read(folder)


def test_a_fifo_in_the_manifest_s_place_is_not_opened(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    with pytest.raises(DamagedError, match=r"manifest\.json is no file"):
        read(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{", "[" * 100_000, "\xff"])
def test_what_is_no_manifest_is_told_in_a_line(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match=r"manifest\.json"):
        read(tmp_path)


def test_another_kind_and_another_format_are_refused(folder):
    with pytest.raises(DamagedError, match="of a bank, expected a checkpoint"):
        Manifest.read(folder, "checkpoint", 3)
    with pytest.raises(DamagedError, match="format 3, this version reads 4"):
        Manifest.read(folder, "bank", 4)


def test_differences_are_told_in_words():
    other = Identity({"the teacher": "x"}, {"train": "b" * 64, "val": "y"}, {"train": "z"})
    assert IDENTITY.differences(other) == ["the teacher", "the rows of val", "the pictures of train"]
    assert IDENTITY.differences(IDENTITY) == []
    assert IDENTITY.key != other.key
