"""Texts of any characters in messages and captions, against the characters' own categories."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_dcd.common.texts import cut, half_character, memory_in_words, one_line, shown, size_in_words, visible

ANY = st.text(st.characters(exclude_categories=[]), max_size=60)


@given(ANY)
def test_visible_takes_out_controls_and_marks_of_direction_alone(text):
    kept = visible(text)
    assert visible(kept) == kept
    for character in set(text) - set(kept):
        assert unicodedata.category(character) in ("Cc", "Cf")
    assert [c for c in text if unicodedata.category(c) not in ("Cc", "Cf")] == [
        c for c in kept if unicodedata.category(c) not in ("Cc", "Cf")
    ]


def test_white_space_and_joiners_stay():
    text = "a\tb\nc\u200dd\u200ce\x85f"
    assert visible(f"\ufeff{text}\u202e\x00") == text


@given(ANY)
def test_a_half_character_is_what_utf8_refuses(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        assert half_character(text) == text[error.start]
    else:
        assert half_character(text) is None


@given(ANY, st.integers(2, 40))
def test_one_line_is_printable_and_shows_both_ends(text, longest):
    line = one_line(text, longest)
    assert line.isprintable()
    if len(text) <= longest and text.isprintable():
        assert line == text
    if len(text) > longest and text.isprintable():
        half = longest // 2
        assert line.startswith(f"{text[:half]} ... ") and line.endswith(text[len(text) - half :])
        assert len(line) <= longest + len(" ... ")


def test_values_are_shown_as_python_writes_them():
    assert shown("a\nb") == r"'a\nb'" and shown(None) == "None"
    assert shown("x" * 200, 20) == f"'{'x' * 9} ... {'x' * 9}'"


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0.0 MB"), (49_999, "0.0 MB"), (999_900_000, "999.9 MB"), (1e9, "1.0 GB"), (2.46e9, "2.5 GB")],
)
def test_sizes(size, words):
    assert size_in_words(size) == words


def test_memory_names_the_gpu_where_there_is_one():
    assert memory_in_words({"host_mb": 812}) == "812 MB"
    assert memory_in_words({"host_mb": 1812, "gpu_mb": 1234}) == "1,812 MB, on the GPU 1,234 MB"


@given(ANY, st.integers(1, 70))
def test_cut_texts_start_alike_and_say_that_they_are_cut(text, longest):
    made = cut(text, longest)
    assert len(made) <= max(longest, 1)
    if len(text) <= longest:
        assert made == text
    else:
        assert made.endswith("…") and text.startswith(made[:-1])
