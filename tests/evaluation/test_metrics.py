import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.evaluation import metrics
from lavis_dcd.evaluation.metrics import coco_1k_five_folds, match_ranks, retrieval_metrics


def make_maps(images: int, per_image: int) -> tuple[dict[int, int], dict[int, list[int]]]:
    img2txt = {i: list(range(i * per_image, (i + 1) * per_image)) for i in range(images)}
    return {t: i for i, texts in img2txt.items() for t in texts}, img2txt


def slow_ranks(scores, matches) -> list[int]:
    """Plain loops: 1 + the non-matching items that score at least as high as the best match."""
    ranks = []
    for query, row in enumerate(scores.tolist()):
        own = matches[query] if isinstance(matches[query], list) else [matches[query]]
        best = max(row[item] for item in own)
        ranks.append(1 + sum(score >= best for item, score in enumerate(row) if item not in own))
    return ranks


def lavis_recalls(scores_i2t, scores_t2i, txt2img, img2txt) -> dict[str, float]:
    """As LAVIS counts: the place of the best-placed match in a full descending sort."""
    orders_i, orders_t = (np.argsort(-scores).tolist() for scores in (scores_i2t, scores_t2i))
    places_i = [min(order.index(t) for t in img2txt[i]) for i, order in enumerate(orders_i)]
    places_t = [order.index(txt2img[t]) for t, order in enumerate(orders_t)]
    result = {}
    for side, places in (("txt", places_i), ("img", places_t)):
        for depth in (1, 5, 10):
            result[f"{side}_r{depth}"] = 100.0 * sum(place < depth for place in places) / len(places)
    return result


def test_agrees_with_lavis_on_scores_without_ties():
    txt2img, img2txt = make_maps(40, 5)
    rng = np.random.default_rng(0)
    scores_i2t = rng.permutation(40 * 200).reshape(40, 200).astype(np.float32)
    scores_t2i = rng.permutation(40 * 200).reshape(200, 40).astype(np.float32)
    for image, texts in img2txt.items():
        scores_i2t[image, texts] += 4000.0 + 0.5
        scores_t2i[texts, image] += 4000.0 + 0.5
    result = retrieval_metrics(scores_i2t, scores_t2i, txt2img, img2txt)
    expected = lavis_recalls(scores_i2t, scores_t2i, txt2img, img2txt)
    assert 10 < expected["img_r1"] < 90
    six = list(expected.values())
    expected |= {
        "txt_r_mean": sum(six[:3]) / 3,
        "img_r_mean": sum(six[3:]) / 3,
        "r_mean": sum(six) / 6,
        "r_sum": sum(six),
        "agg_metrics": sum(six) / 6,
        "txt_median_rank": float(np.median(slow_ranks(scores_i2t, img2txt))),
        "img_median_rank": float(np.median(slow_ranks(scores_t2i, txt2img))),
    }
    assert result == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in result.values())


@st.composite
def tied_cases(draw):
    queries, items = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    levels = st.sampled_from([-np.inf, -1.0, 0.0, 0.25, 2.0, np.inf])
    scores = np.array([[draw(levels) for _ in range(items)] for _ in range(queries)])
    matches = {
        q: draw(st.lists(st.integers(0, items - 1), min_size=1, max_size=4, unique=True)) for q in range(queries)
    }
    return scores, matches


@settings(deadline=None, max_examples=150)
@given(
    tied_cases(),
    st.sampled_from([1, 5, 10_000]),
    st.sampled_from(["numpy", "torch", "bfloat16", "numpy transposed", "torch transposed", "bfloat16 transposed"]),
)
def test_ranks_agree_with_loops_whatever_the_ties_and_blocks(case, block, kind):
    scores, matches = case
    # in memory the other way round: a view of what was computed for the other direction
    laid_out = np.ascontiguousarray(scores.T).T if "transposed" in kind else scores
    given_scores = {
        "numpy": laid_out,
        "torch": torch.from_numpy(laid_out),
        "bfloat16": torch.from_numpy(laid_out).bfloat16(),
    }[kind.split()[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK_SCORES", block)
        assert match_ranks(given_scores, matches).tolist() == slow_ranks(scores, matches)


def test_more_rows_than_eight_bits_count():
    scores = np.zeros((2, 700), dtype=np.float32)
    for table in (scores, np.ascontiguousarray(scores.T).T):
        assert match_ranks(table, {0: 3, 1: [4, 5]}).tolist() == [700, 699]


def test_a_constant_model_earns_nothing():
    txt2img, img2txt = make_maps(20, 5)
    result = retrieval_metrics(np.zeros((20, 100)), np.zeros((100, 20)), txt2img, img2txt)
    assert result["r_sum"] == 0
    assert result["txt_median_rank"] == 96 and result["img_median_rank"] == 20


def test_matches_that_tie_with_each_other_cost_nothing():
    txt2img, img2txt = make_maps(3, 2)
    scores = np.kron(np.eye(3), np.ones((1, 2)))
    result = retrieval_metrics(scores, scores.T, txt2img, img2txt)
    assert result["r_mean"] == 100 and result["txt_median_rank"] == 1


def test_a_text_may_show_several_images():
    img2txt = {0: [0], 1: [0, 1]}
    txt2img = {0: [0, 1], 1: 1}
    scores = np.array([[1.0, 2.0], [3.0, 0.0]])
    result = retrieval_metrics(scores, scores.T, txt2img, img2txt)
    assert result["txt_r1"] == 50 and result["img_r1"] == 50


def test_torch_and_transposed_views_give_the_same():
    txt2img, img2txt = make_maps(6, 3)
    scores = np.random.default_rng(3).normal(size=(6, 18)).astype(np.float32)
    tensor = torch.from_numpy(scores).requires_grad_()
    assert retrieval_metrics(tensor, tensor.T, txt2img, img2txt) == retrieval_metrics(
        scores, scores.T.copy(), txt2img, img2txt
    )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_five_folds_are_the_mean_of_five_small_evaluations(as_tensor):
    images, per_image = 20, 3
    rng = np.random.default_rng(4)
    order = rng.permutation(images * per_image)  # texts of an image need not lie together
    img2txt = {i: order[i * per_image : (i + 1) * per_image].tolist() for i in range(images)}
    txt2img = {t: i for i, texts in img2txt.items() for t in texts}
    scores_i2t, scores_t2i = rng.normal(size=(20, 60)), rng.normal(size=(60, 20))
    expected = []
    for fold in range(5):
        rows = list(range(4 * fold, 4 * fold + 4))
        texts = [t for t in range(60) if txt2img[t] in rows]
        expected.append(
            retrieval_metrics(
                scores_i2t[rows][:, texts],
                scores_t2i[texts][:, rows],
                {k: rows.index(txt2img[t]) for k, t in enumerate(texts)},
                {k: [texts.index(t) for t in img2txt[i]] for k, i in enumerate(rows)},
            )
        )
    given_scores = [torch.from_numpy(s) if as_tensor else s for s in (scores_i2t, scores_t2i)]
    result = coco_1k_five_folds(*given_scores, txt2img, img2txt, images_per_fold=4)
    assert result == pytest.approx({key: np.mean([one[key] for one in expected]) for key in expected[0]})
    with pytest.raises(ValueError, match="5 folds of 1000 images need 5000 images, got 20"):
        coco_1k_five_folds(*given_scores, txt2img, img2txt)


def test_blocks_bound_the_memory():
    table = np.broadcast_to(np.float32(0), (5000, 25_000))
    for scores in (table, table.T):
        shapes = [block.shape for _, block in metrics._blocks(scores)]
        assert sum(height for height, _ in shapes) == len(scores)
        assert max(height * width for height, width in shapes) <= metrics._BLOCK_SCORES


def test_errors_name_what_is_wrong():
    txt2img, img2txt = make_maps(2, 2)
    scores = np.arange(8.0).reshape(2, 4)

    def run(i2t=scores, t2i=scores.T, t2i_map=txt2img, i2t_map=img2txt):
        retrieval_metrics(i2t, t2i, t2i_map, i2t_map)

    run()
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(2, 4\)"):
        run(t2i=scores)
    with pytest.raises(ValueError, match=r"got \(0, 4\) and \(4, 0\)"):
        run(i2t=scores[:0], t2i=scores[:0].T)
    with pytest.raises(ValueError, match=r"img2txt must have the keys 0\.\.1, .* it has 1 keys"):
        run(i2t_map={0: [0, 1]})
    with pytest.raises(ValueError, match=r"txt2img must have the keys 0\.\.3"):
        run(t2i_map={1: 0, 2: 0, 3: 1, 4: 1})
    with pytest.raises(ValueError, match=r"img2txt\[1\] is empty"):
        run(i2t_map={0: [0, 1], 1: []})
    with pytest.raises(ValueError, match=r"img2txt\[1\] names row 4, but there are 4"):
        run(i2t_map={0: [0, 1], 1: [2, 4]})
    with pytest.raises(ValueError, match="disagree: only one of them joins text 1 and image 0"):
        run(i2t_map={0: [0], 1: [1, 2, 3]})
    bad = scores.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="scores_t2i holds NaN between rows 0 and 3, columns 0 and 1"):
        run(t2i=bad.T)
    with pytest.raises(ValueError, match=r"scores_t2i holds NaN between rows 0 and 3$"):
        run(t2i=bad.T.copy())
    with pytest.raises(ValueError, match=r"scores must be \[Q, N\]"):
        match_ranks(np.zeros(3), {})
