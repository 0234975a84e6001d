"""Tables of pairs: each distinct pair is matched once, and invalid entries are 0 and carry no gradient."""

import pytest
import torch

from lavis_dcd.distillation.candidates import CandidatePool
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.models.batch import BatchFeatures
from lavis_dcd.models.dcd.scores import ScoreTable, gather_tables, match_tables


def features() -> BatchFeatures:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 4, 1, 3, generator=generator).unbind()
    rows = torch.arange(4)
    return BatchFeatures(
        images=ImageFeatures(tokens[0]),
        texts=TextFeatures(tokens[1]),
        image_ids=rows,
        text_image_ids=rows,
        match_pairs=torch.stack([rows, rows], dim=1),
    )


def tables() -> list[ScoreTable]:
    queries = torch.arange(4)[:, None].expand(4, 3)
    answers = torch.tensor([[0, 1, 2], [1, 0, 3], [2, 3, 0], [3, 0, 1]])
    valid = torch.tensor([[True, True, False], [True, True, True], [True, False, False], [True, True, True]])
    pools = [
        CandidatePool(queries, answers, valid, "image_to_text"),
        CandidatePool(answers, queries, valid, "text_to_image"),
    ]
    return [ScoreTable.of(pool) for pool in pools]


def test_every_distinct_valid_pair_is_matched_once():
    batch, seen = features(), []

    def match(images, texts, pairs):
        seen.extend(map(tuple, pairs.tolist()))
        return (images.tokens[pairs[:, 0], 0] * texts.tokens[pairs[:, 1], 0]).sum(dim=-1)

    scored = match_tables(match, batch, tables())
    expected = {
        (int(table.image_rows[q, c]), int(table.text_rows[q, c]))
        for table in scored for q in range(4) for c in range(3) if table.valid[q, c]
    }  # fmt: skip
    assert len(seen) == len(set(seen)) and set(seen) == expected
    all_pairs = batch.images.tokens[:, 0] @ batch.texts.tokens[:, 0].T
    for by_pair, gathered in zip(scored, gather_tables(all_pairs, tables()), strict=True):
        assert by_pair.known_scores()[~by_pair.valid].eq(0).all()
        torch.testing.assert_close(by_pair.scores, gathered.scores)


def test_invalid_entries_carry_no_gradient():
    scores = torch.randn(4, 4, requires_grad=True)
    table = tables()[0]
    gather_tables(scores, [table])[0].known_scores().sum().backward()
    used = torch.zeros(4, 4).index_put((table.image_rows[table.valid], table.text_rows[table.valid]), torch.ones(()))
    assert torch.equal(scores.grad, used)


def test_everything_may_be_scored():
    pool = CandidatePool(
        *torch.zeros(2, 1, 2, dtype=torch.long).unbind(), torch.tensor([[True, False]]), "image_to_text"
    )
    assert ScoreTable.of(pool, everything=True).valid.tolist() == [[True, True]]
    assert ScoreTable.of(pool).valid.tolist() == [[True, False]]


def test_an_unscored_table_has_no_scores():
    with pytest.raises(ValueError, match="not scored"):
        tables()[0].known_scores()
