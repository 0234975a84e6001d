"""Every strategy of selection in the distiller: which pairs the student scores, against plain loops."""

import itertools

import pytest
import torch
from stubs import ColourMatcher as Stub

from lavis_dcd.common.seeding import seed_for
from lavis_dcd.models.dcd import DynamicContrastiveDistillation
from lavis_dcd.models.dcd.config import CandidatesConfig, DcdConfig, PoolConfig, PrescreenConfig, SelectionConfig

SIZE, CAPTIONS, COUNT, SEED = 9, 8, 3, 5
DIRECTIONS = ("image_to_text", "text_to_image")


def distiller(source, **selection):
    teacher, student = Stub(1, joint=True), Stub(2)
    student.tower = teacher.tower
    candidates = CandidatesConfig()
    if source == "random":
        candidates = CandidatesConfig(
            image_to_text=PoolConfig(source="random", count=CAPTIONS), text_to_image=PoolConfig()
        )
    config = DcdConfig(candidates=candidates, selection=SelectionConfig(hard_negatives=COUNT, **selection))
    return DynamicContrastiveDistillation(teacher, student, config).train()


def samples(source):
    batch = {
        "image": torch.randn(SIZE, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
        "text_input": [f"caption {'x' * (3 * i % 7)} {i}" for i in range(SIZE)],
        "image_id": torch.arange(SIZE),
        "epoch": 0, "iters": 1, "num_iters_per_epoch": 100, "draw_seed": SEED,
    }  # fmt: skip
    if source == "random":
        drawn = range(SIZE * CAPTIONS)
        batch["candidate_text"] = [f"drawn {'y' * (5 * i % 11)} {i}" for i in drawn]
        batch["candidate_image_id"] = torch.tensor([100 + i for i in drawn]).view(SIZE, CAPTIONS)
    return batch


def pools(source):
    """By direction, each query's candidates as (picture, text) rows of the batch, the match first."""
    others = [[c for c in range(SIZE) if c != q] for q in range(SIZE)]
    to_text = [[(q, t) for t in [q, *others[q]]] for q in range(SIZE)]
    if source == "random":  # the drawn captions come after those of the samples
        to_text = [[(q, q)] + [(q, SIZE + q * CAPTIONS + c) for c in range(CAPTIONS)] for q in range(SIZE)]
    return {DIRECTIONS[0]: to_text, DIRECTIONS[1]: [[(i, q) for i in [q, *others[q]]] for q in range(SIZE)]}


def numbers(width, *purpose):
    """The numbers that a direction draws for its queries."""
    return torch.rand(SIZE, width, generator=torch.Generator().manual_seed(seed_for(SEED, *purpose))).tolist()


def chosen(strategy, candidates, scores, count, *purpose):
    """Of each query's candidates (columns of its pool) the chosen ones, in plain Python."""
    width = len(scores[0]) - 1
    drawn = numbers({"stratified": count}.get(strategy, width), *purpose)
    rows = []
    for q, columns in enumerate(candidates):
        by_score = sorted(columns, key=lambda c, q=q: (-scores[q][c], c))
        by_chance = sorted(columns, key=lambda c, q=q: (-drawn[q][c - 1] if strategy != "stratified" else 0, c))
        if strategy == "hardest":
            rows.append(by_score[:count])
        elif strategy == "random":
            rows.append(by_chance[:count])
        elif strategy == "mixed":
            hard = by_score[: -(-count // 2)]
            rows.append(hard + [c for c in by_chance if c not in hard][: count - len(hard)])
        else:
            left, taken = list(columns), []
            high, low = (f([scores[q][c] for c in columns], default=0) for f in (max, min))
            for k, jitter in enumerate(drawn[q]):
                level = high - (k + jitter) / count * (high - low)
                nearest = min(left, key=lambda c, q=q, level=level: (abs(scores[q][c] - level), c), default=None)
                if nearest is not None:
                    left.remove(nearest)
                    taken.append(nearest)
            rows.append(taken)
    return rows


CASES = itertools.product(
    ["hardest", "mixed", "random", "stratified"], ["in_batch", "random"], [None, 0.2], [None, "joint"]
)


@pytest.mark.parametrize(("strategy", "source", "margin", "by"), CASES)
def test_the_student_scores_what_the_strategy_chooses(strategy, source, margin, by):
    keep = 5
    prescreen = None if by is None else PrescreenConfig(by=by, keep=keep, check_every=0)
    model, batch = distiller(source, strategy=strategy, margin=margin, prescreen=prescreen), samples(source)
    texts = batch["text_input"] + batch.get("candidate_text", [])
    with torch.no_grad():
        images, text_features = model.teacher.encode_images(batch["image"]), model.teacher.encode_texts(texts)
        teacher = model.teacher.match_all(images, text_features).double()
        joint = (model.teacher.embed_images(images) @ model.teacher.embed_texts(text_features).T).double()
    expected = set()
    for direction, pool in pools(source).items():
        scores = [[float(teacher[pair]) for pair in row] for row in pool]
        candidates = [list(range(1, len(row))) for row in pool]
        if by is not None:
            cheap = [[float(joint[pair]) for pair in row] for row in pool]
            how = strategy if strategy != "random" else "hardest"
            candidates = [sorted(row) for row in chosen(how, candidates, cheap, keep, direction, "prescreen")]
        if margin is not None:
            candidates = [[c for c in row if scores[q][c] <= scores[q][0] + margin] for q, row in enumerate(candidates)]
        kept = chosen(strategy, candidates, scores, COUNT, direction)
        expected |= {pool[q][c] for q, row in enumerate(kept) for c in [0, *row]}
    model.student.matched.clear()
    model(batch)
    assert set().union(*model.student.matched) == expected
