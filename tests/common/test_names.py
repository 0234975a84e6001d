"""Names of folders: what is refused, and that two titles never share a folder."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_dcd.common.names import LONGEST_NAME, folder_name, name_fault, path_fault


@pytest.mark.parametrize(
    "name", ["run", "meter_coco", "2026-01-01", "été 3", "a" * LONGEST_NAME, "ü" * (LONGEST_NAME // 2)]
)
def test_usual_names_pass(name):
    assert name_fault(name, "run.job_id") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "empty"), ("  ", "empty"), (" a", "space"), ("..", "dot"), (".", "dot"), (".hidden", "dot"),
        ("a/b", "/"), ("../../x", "/"), ("/tmp/x", "/"), ("a\\b", "/"), ("a\0b", "printed"), ("a\nb", "printed"),
        ("a\u202eb", "printed"), ("a\ud800", "printed"), ("a\u2028b", "printed"), ("a" * 201, "201 bytes"),
        ("%s/%d", "/"),
        ("ü" * 101, "202 bytes"), (3, "int"), (None, "NoneType"), (["a"], "list"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_folder_is_told_in_one_line(name, words):
    fault = name_fault(name, "run.job_id")
    assert fault is not None
    assert fault.startswith("run.job_id: ") and words in fault
    assert fault.isprintable() and len(fault) < 400


@given(st.text(max_size=300))
def test_every_name_that_passes_makes_one_folder(tmp_path_factory, name):
    if name_fault(name, "f") is None:
        parent = tmp_path_factory.mktemp("p")
        (parent / name).mkdir()
        assert [p.name for p in parent.iterdir()] == [name]


@pytest.mark.parametrize(
    "titles",
    [("margin 1", "margin -1", "margin-1", "Margin 1", "margin  1", "margin 1 "),
     ("K+", "K-", "K", "k"), ("é", "è", "e"),
     ("a" * 80, "a" * 81, "a" * 82)],
)  # fmt: skip
def test_titles_that_differ_in_signs_alone_have_folders_of_their_own(titles):
    assert len({folder_name(title) for title in titles}) == len(titles)


def test_plain_titles_keep_their_letters():
    assert folder_name("ground truth alone") == "ground-truth-alone"
    assert folder_name("student") == "student"


@given(st.text(max_size=200))
def test_every_title_gives_a_name_that_passes(title):
    assert name_fault(folder_name(title), "f") is None


@pytest.mark.parametrize("path", [".", "/data/out", "../out put/ü", "x" * 255])
def test_usual_paths_pass(path):
    assert path_fault(path, "run.output_dir") is None


@pytest.mark.parametrize("path", ["", " ", "a\0b", "a\nb", "a\ud800", "x" * 256, "d/" * 2000, None, 7])
def test_paths_that_are_none_are_told_in_one_line(path):
    line = path_fault(path, "run.output_dir")
    assert line.startswith("run.output_dir: ") and line.isprintable() and len(line) < 300
