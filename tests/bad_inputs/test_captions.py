"""Captions of odd characters and lengths: what the models' processors and tokenizers make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lavis")

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import half_character, one_line, shown, visible
from lavis_dcd.models.dual_encoder.config import TextConfig
from lavis_dcd.models.towers import TextTower
from lavis_dcd.processors.captions import CaptionConfig, DcdCaptionProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "##s"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return file


def _tower(vocabulary: Path, entries: int) -> TextTower:
    sizes = {"vocab_size": entries, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 16}  # fmt: skip
    return TextTower(TextConfig("bert", str(vocabulary), max_length=8, config=sizes))


READ = {
    "control characters": ("a\0 red\x07 \x1bdog\x7f", "a red dog"),
    "a line break and tabs": ("a\r\n\tred\x0b dog\x85", "a red dog"),
    "marks of direction": ("\u200fa \u202ered\u202c \u2067dog\u2069", "a red dog"),
    "a byte order mark": ("\ufeffa red dog", "a red dog"),
    "spaces of all kinds": ("a\u00a0red\u2003dog", "a red dog"),
    "zero-width joiners are letters' and emoji's": ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),
    "Arabic": ("كلب أحمر", "كلب أحمر"),
}


@pytest.mark.parametrize("name", READ)
def test_what_nobody_sees_is_dropped(name):
    given, expected = READ[name]
    assert DcdCaptionProcessor()(given) == expected


def test_ten_thousand_words(vocabulary):
    caption = " ".join(["a red dog"] * 3334)
    assert DcdCaptionProcessor()(caption) == caption
    assert DcdCaptionProcessor(CaptionConfig(max_words=4))(caption) == "a red dog a"
    tower = _tower(vocabulary, len(WORDS))
    batch = tower.tokenizer([caption], truncation=True, max_length=tower.max_length)
    assert batch["input_ids"] == [[2, 5, 6, 7, 5, 6, 7, 3]]


def test_a_vocabulary_with_more_ids_than_the_model_has_rows(vocabulary):
    with pytest.raises(UserError) as caught:
        _ = _tower(vocabulary, len(WORDS) - 1).tokenizer
    assert caught.value.faults == [
        f"model.text.name: the tokenizer {vocabulary} has 9 entries, the text tower only 8: name the tokenizer that "
        "the weights were trained with"
    ]
    assert len(_tower(vocabulary, len(WORDS)).tokenizer) == 9


def test_texts_in_messages():
    assert visible("a\u200e\x00b c") == "ab c"
    assert one_line("a\nb\u202e\ud800") == r"a\nb\u202e\ud800"
    assert half_character("a \ud83d dog") == "\ud83d" and half_character("a \U0001f415") is None
    assert one_line("x" * 1000, 10) == "xxxxx ... xxxxx"
    assert shown("a\n") == r"'a\n'"
