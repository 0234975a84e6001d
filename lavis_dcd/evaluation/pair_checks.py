"""Faults of a job's matchers and data that would show during the run only, found before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from lavis_dcd.banks.encoding import evaluation_mode, scoring_mode
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.ensemble import Ensemble, members_of

CAPTIONS_COMPARED = 8


def shortlist_faults(
    matchers: Mapping[str, Matcher | Ensemble], k_test: int | None, shortlist: str | None
) -> list[str]:
    """Return one line per matcher that is to rerank a shortlist which no matcher can make.

    Args:
        matchers: of the job, by name.
        k_test: of the ``run:`` section.
        shortlist: of the ``run:`` section.
    """
    if k_test is None:
        return []
    named = None if shortlist == "joint" else shortlist
    if named is not None and named not in matchers:
        return [f"run.shortlist: {named!r} is none of this job's matchers: {', '.join(['joint', *matchers])}"]
    makers = {name: named or name for name, matcher in matchers.items() if matcher.family == "fusion"}
    return [
        f"run.k_test: the {name} would rerank a shortlist by the joint space of the {maker}, which has none; name a "
        f"matcher that has one in run.shortlist{_able(matchers)}, or leave k_test out to score every pair"
        for name, maker in makers.items()
        if not matchers[maker].has_joint_space
    ]


def caption_faults(
    matchers: Mapping[str, Matcher | Ensemble], captions_for: Callable[[Matcher], Iterable[str]]
) -> list[str]:
    """Return one line per matcher that reads different captions as one and the same text.

    Args:
        matchers: of the job, by name.
        captions_for: captions of the job's data as a matcher gets them; the first few different ones are compared.
    """
    faults = []
    for name, matcher in matchers.items():
        for member in members_of(matcher):
            captions = list(islice(dict.fromkeys(captions_for(member)), CAPTIONS_COMPARED))
            if len(captions) > 1 and _all_alike(member, captions):
                faults.append(
                    f"model.{name}: its tokenizer leaves nothing of the captions: {captions[0]!r} and {captions[1]!r} "
                    "become the same text; raise its longest text (max_length, max_txt_len), or name the tokenizer of "
                    "its language"
                )
    return faults


def learning_faults(student: Matcher, image: Tensor, captions: Iterable[str]) -> list[str]:
    """Return a line if no parameter that the student's scores depend on would learn.

    Args:
        image: one of the job's pictures as the student gets it, float ``[3, H, W]``.
        captions: of the job's data as the student gets them; the first is scored.
    """
    with evaluation_mode(student) as device, torch.enable_grad():
        images = student.encode_images(image[None].to(device))
        texts = student.encode_texts(list(islice(captions, 1)))
        scores = student.match(images, texts, torch.zeros(1, 2, dtype=torch.long, device=device))
    if scores.requires_grad:
        return []
    return ["model.student: none of the parameters that its scores depend on would learn; unfreeze a tower, or keep a "
            "fusion of its own"]  # fmt: skip


def _able(matchers: Mapping[str, Matcher | Ensemble]) -> str:
    """Return the names of the matchers that can make a shortlist, in brackets."""
    able = [name for name, matcher in matchers.items() if matcher.has_joint_space]
    return f" ({' or '.join(able)})" if able else ""


def _all_alike(matcher: Matcher, captions: list[str]) -> bool:
    """Return whether no caption's real tokens differ from the first one's."""
    with scoring_mode(matcher):
        features = matcher.encode_texts(captions)
    mask = features.full_mask()
    if len(mask.sum(dim=1).unique()) > 1:
        return False
    tokens = features.tokens.float() * mask[..., None]
    return bool(torch.allclose(tokens, tokens[:1].expand_as(tokens), rtol=1e-5, atol=1e-6))
