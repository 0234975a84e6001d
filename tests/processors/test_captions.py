from __future__ import annotations

import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.processors import captions


def process(text: str, **keys) -> str:
    return captions.DcdCaptionProcessor.from_config({"name": "dcd_caption", **keys})(text)


def test_the_default_keeps_words_case_and_punctuation_and_joins_white_space():
    assert process("  A man's dog,\tin\n the SNOW ... (again) !  ") == "A man's dog, in the SNOW ... (again) !"
    assert captions.DcdCaptionProcessor()("A  b") == "A b"


def test_max_words_cuts_whole_words_at_the_end():
    assert process("one two three four", max_words=3) == "one two three"
    assert process("one two", max_words=3) == "one two"
    assert process("one two", max_words=None) == "one two"


def test_the_prompt_is_neither_counted_nor_lowered():
    assert process("A Red Star", prompt="A photo of ", lower=True, max_words=2) == "A photo of a red"


def test_lower_lowers():
    assert process("A Red STAR", lower=True) == "a red star"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"max_word": 3}, "text_processor.max_word: unknown key; did you mean max_words?"),
        ({"max_words": "many"}, "text_processor.max_words: 'many' (text) is not an integer"),
        ({"max_words": 0}, "text_processor: max_words: 0 is not positive"),
        ({"lower": "perhaps"}, "text_processor.lower: 'perhaps' (text) is not true or false"),
    ],
)
def test_a_wrong_key_or_value_is_told(keys, line):
    with pytest.raises(UserError) as caught:
        process("a", **keys)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(line)


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError) as caught:
        process("a", max_word=3, lower="perhaps")
    assert len(caught.value.faults) == 2


def test_lavis_finds_it_by_name():
    from lavis.common.registry import registry

    assert registry.get_processor_class("dcd_caption") is captions.DcdCaptionProcessor
