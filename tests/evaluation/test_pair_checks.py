"""Pairs that cannot work are refused before training, in a line that says which and what to change."""

import torch
from torch import nn

from lavis_dcd.evaluation.pair_checks import caption_faults, shortlist_faults
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble
from lavis_dcd.matching.features import TextFeatures


class Reader(nn.Module, Matcher):
    """Reads the first ``length`` words of a text as their lengths."""

    def __init__(self, length: int = 4, joint: bool = False, family: str = "fusion") -> None:
        super().__init__()
        self.length, self.has_joint_space, self.family = length, joint, family

    def encode_images(self, images):
        raise AssertionError("no picture is read")

    def encode_texts(self, texts):
        tokens = torch.zeros(len(texts), 2 + self.length, 1)
        mask = torch.zeros(len(texts), 2 + self.length, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = [1, *[len(word) for word in text.split()[: self.length]], 2]
            tokens[row, : len(words), 0] = torch.tensor(words)
            mask[row, : len(words)] = True
        return TextFeatures(tokens, mask)

    def match(self, images, texts, pairs):
        raise AssertionError("no pair is scored")


def captions(matcher):
    return ["a dog", "two elephants", "a dog"]


def test_a_tokenizer_that_leaves_nothing_is_named():
    found = caption_faults({"teacher": Reader(), "student": Reader(length=0)}, captions)
    assert len(found) == 1
    assert found[0].startswith("model.student: its tokenizer leaves nothing of the captions: 'a dog' and")
    assert "max_length" in found[0]


def test_every_member_of_an_ensemble_is_asked():
    assert caption_faults({"teacher": Ensemble([Reader(), Reader(length=0)])}, captions)
    assert not caption_faults({"teacher": Ensemble([Reader(), Reader()])}, captions)


def test_captions_alike_in_their_first_words_are_no_fault():
    assert not caption_faults({"student": Reader(length=1)}, lambda _: ["a dog", "a cat", "two cats"])
    assert not caption_faults({"student": Reader(length=0)}, lambda _: ["the same", "the same"])
    assert not caption_faults({"student": Reader(length=0)}, lambda _: [])


def test_a_shortlist_that_nobody_can_make():
    matchers = {"teacher": Reader(), "student": Reader(joint=True)}
    (line,) = shortlist_faults(matchers, 8, None)
    assert line.startswith("run.k_test: the teacher would rerank a shortlist by the joint space of the teacher")
    assert "run.shortlist (student)" in line
    assert not shortlist_faults(matchers, 8, "student")
    assert not shortlist_faults(matchers, None, None)
    assert len(shortlist_faults(matchers, 8, "teacher")) == 2
    (line,) = shortlist_faults(matchers, 8, "pupil")
    assert line == "run.shortlist: 'pupil' is none of this job's matchers: joint, teacher, student"


def test_a_dual_encoder_needs_no_shortlist():
    assert not shortlist_faults({"student": Reader(family="dual", joint=True)}, 8, None)
    assert not shortlist_faults({"student": Reader(family="dual")}, 8, "joint")
