"""A local folder in the place of the hub's vocabulary."""

from __future__ import annotations

import pytest
from transformers import BertTokenizer

from lavis_dcd.common.errors import UserError
from lavis_dcd.matching.adapters.vocabulary import HUB_NAME, local_vocabulary


@pytest.mark.parametrize("part", ["", "vocab.txt"])
def test_a_folder_or_a_file_stands_for_the_hub(vocabulary, part):
    with local_vocabulary(str(vocabulary / part), "model.tokenizer"):
        tokenizer = BertTokenizer.from_pretrained(HUB_NAME, truncation_side="left")
    assert tokenizer.tokenize("A Dog RUNS zebra") == ["a", "dog", "runs", "[UNK]"]
    assert tokenizer.truncation_side == "left"


def test_other_names_and_later_calls_are_left_alone(vocabulary, tmp_path):
    before = BertTokenizer.from_pretrained
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nzebra\n")
    with pytest.raises(RuntimeError, match="inside"), local_vocabulary(str(vocabulary), "model.tokenizer"):
        assert BertTokenizer.from_pretrained(str(tmp_path)).tokenize("zebra") == ["zebra"]
        raise RuntimeError("inside")
    assert BertTokenizer.from_pretrained == before
    assert "from_pretrained" not in vars(BertTokenizer)


def test_folders_without_berts_vocabulary_are_refused(tmp_path):
    def refused(match, path=tmp_path):
        with pytest.raises(UserError, match=match), local_vocabulary(str(path), "model.tokenizer"):
            pass

    refused("model.tokenizer: no vocab.txt in")
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\n[UNK]\n")
    refused(r"is no BERT vocabulary: it lacks \[PAD\], \[CLS\], \[SEP\], \[MASK\]")
    (tmp_path / "vocab.bin").write_bytes(bytes(range(128, 256)))
    refused("is no text file", tmp_path / "vocab.bin")


def test_an_unreachable_hub_is_named_and_other_errors_pass():
    with pytest.raises(UserError, match=r"model.tokenizer: .*name a local folder"), \
            local_vocabulary(None, "model.tokenizer"):  # fmt: skip
        raise OSError(f"Can't load tokenizer for '{HUB_NAME}'")
    with pytest.raises(OSError, match="disk full"), local_vocabulary(None, "model.tokenizer"):
        raise OSError("disk full")
