from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.shape_scenes.captions import (
    SPECIAL_TOKENS,
    Claims,
    Mention,
    SceneIndex,
    is_true,
    scenes_vocabulary,
    write_captions,
)
from lavis_dcd.datasets.shape_scenes.drawing import draw_scene
from lavis_dcd.datasets.shape_scenes.scenes import FAMILY, MOST_SCENES, RELATIONS, Scene, Thing, make_splits

GOLDEN_TEST_CAPTIONS = "a888ceb64f60f8ff5d92e1a1626bb0a647da7d430f87c047b3272b1f4add0187"
COUNTS = {"train": 3000, "val": 300, "test": 300}
RED = Thing("red", "circle", "large")
BLUE = Thing("blue", "square", "small")
GREEN = Thing("green", "star", "small")


@pytest.fixture(scope="module")
def splits():
    return make_splits(COUNTS, seed=0)


@pytest.fixture(scope="module")
def captions(splits):
    """{split: [[Caption, ...] per scene]}, as the data set words them."""
    found = {}
    for name, split in splits.items():
        index = SceneIndex(split.scenes)
        streams = (np.random.default_rng([0, 13, split.first + row]) for row in range(len(split.scenes)))
        found[name] = [write_captions(s, index, 5, r) for s, r in zip(split.scenes, streams, strict=True)]
    return found


def test_default_sizes_names_and_no_scene_twice_in_the_whole_set(splits):
    assert {name: len(split.scenes) for name, split in splits.items()} == COUNTS
    assert len({scene for split in splits.values() for scene in split.scenes}) == sum(COUNTS.values())
    names = [name for split in splits.values() for name in split.names]
    assert sorted(names) == [f"scene_{i:06d}" for i in range(sum(COUNTS.values()))]


def test_scenes_of_one_two_and_three_things(splits):
    sizes = Counter(len(scene.things) for scene in splits["train"].scenes)
    assert sizes[2] > sizes[3] > sizes[1] > 100


def test_families_stay_within_a_split(splits):
    of_split = [set(split.families) for split in splits.values()]
    assert not (of_split[0] & of_split[1] or of_split[0] & of_split[2] or of_split[1] & of_split[2])
    assert set(Counter(splits["train"].families).values()) == {len(FAMILY)}


def _changed(one: Scene, two: Scene) -> list[str]:
    """Which attributes differ at the same place in the layout."""
    pairs = zip(one.things, two.things, strict=True)
    return [key for a, b in pairs for key in ("colour", "shape", "size") if getattr(a, key) != getattr(b, key)]


def _kinds_of_pairs(members: list[Scene]) -> set[str]:
    found = set()
    for i, one in enumerate(members):
        for two in members[i + 1 :]:
            changed = _changed(one, two)
            if one.layout != two.layout:
                found |= {"place"} if not changed else set()
            elif len(changed) == 1:
                found.add(changed[0])
            elif sorted(one.things) == sorted(two.things):
                found.add("order")
            elif changed == ["colour", "colour"] and sorted(t.colour for t in one.things) == sorted(
                t.colour for t in two.things
            ):
                found.add("binding")
    return found


def test_a_family_differs_in_one_attribute_in_order_and_in_binding(splits):
    split = splits["test"]
    for family in sorted(set(split.families)):
        members = [s for s, f in zip(split.scenes, split.families, strict=True) if f == family]
        assert len({len(scene.things) for scene in members}) == 1
        wanted = {"colour", "shape", "size"} | ({"place"} if len(members[0].things) == 1 else {"order"})
        assert wanted <= _kinds_of_pairs(members), members


def test_evaluation_scenes_do_not_depend_on_the_number_of_training_scenes(splits):
    fewer = make_splits(COUNTS | {"train": 30}, seed=0)
    assert fewer["test"] == splits["test"] and fewer["val"] == splits["val"]
    assert len(fewer["train"].scenes) == 30


def test_another_seed_gives_other_scenes(splits):
    assert make_splits(COUNTS, seed=1)["test"].scenes != splits["test"].scenes


def test_an_incomplete_last_family():
    split = make_splits({"test": 8}, seed=0)["test"]
    assert sorted(Counter(split.families).values()) == [2, 6]


def test_too_many_scenes():
    with pytest.raises(UserError, match="at most"):
        make_splits({"train": MOST_SCENES + 1}, seed=0)


# -- truth ---------------------------------------------------------------------------------------------------


def _says(things, relations=(), only=False, place=None):
    mentions = tuple(Mention(t.colour, t.shape, t.size) for t in things)
    return Claims(mentions, relations, only, place)


def test_truth_of_claims():
    beside = Scene("beside", (RED, BLUE))
    assert is_true(_says([RED, BLUE], (("left", 0, 1),)), beside)
    assert not is_true(_says([BLUE, RED], (("left", 0, 1),)), beside)
    assert not is_true(_says([RED, BLUE], (("above", 0, 1),)), beside)
    assert is_true(_says([BLUE]), beside) and not is_true(_says([BLUE], only=True), beside)
    assert is_true(Claims((Mention("red", "circle", None),)), beside)
    assert not is_true(Claims((Mention("red", "circle", "small"),)), beside)
    assert not is_true(_says([RED, BLUE, GREEN]), beside)
    assert is_true(_says([RED], only=True, place="top"), Scene("top", (RED,)))
    assert not is_true(_says([RED], only=True, place="left"), Scene("top", (RED,)))


@pytest.mark.parametrize(
    ("layout", "true", "false"),
    [
        ("row", [("left", 0, 2)], [("left", 2, 0), ("above", 0, 1)]),
        ("column", [("above", 0, 2)], [("above", 1, 0), ("left", 0, 1)]),
        ("roof", [("above", 0, 1), ("above", 0, 2), ("left", 1, 2)], [("left", 0, 1), ("above", 1, 0)]),
        ("bowl", [("above", 1, 0), ("above", 2, 0), ("left", 1, 2)], [("above", 0, 1), ("left", 2, 1)]),
    ],
)
def test_relations_of_three(layout, true, false):
    scene = Scene(layout, (RED, BLUE, GREEN))
    assert all(is_true(_says(scene.things, (relation,)), scene) for relation in true)
    assert not any(is_true(_says(scene.things, (relation,)), scene) for relation in false)


@pytest.mark.slow
def test_the_index_finds_what_a_search_of_all_scenes_finds(splits, captions):
    scenes = splits["val"].scenes
    index = SceneIndex(scenes)
    for caption in [c for of_scene in captions["test"][:40] for c in of_scene]:
        assert index.matches(caption.claims) == [i for i, s in enumerate(scenes) if is_true(caption.claims, s)]


# -- captions ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("split", list(COUNTS))
def test_every_caption_is_true_of_its_own_scene_and_of_no_other_of_the_split(splits, captions, split):
    index = SceneIndex(splits[split].scenes)
    for row, of_scene in enumerate(captions[split]):
        assert len({caption.text for caption in of_scene}) == 5
        assert all(index.matches(caption.claims) == [row] for caption in of_scene)


def test_some_captions_leave_things_out(captions):
    every = [caption for of_scene in captions["train"] for caption in of_scene]
    assert 0.2 < np.mean([any(m.size is None for m in c.claims.mentions) for c in every]) < 0.9


def test_the_words_say_what_the_claims_say(captions):
    """An independent reading of the plain templates: 'A <relation> B'."""
    words = {
        "left": "left of|to the left of|on the left of|on the left side of",
        "right": "right of|to the right of|on the right of|on the right side of",
        "above": "above|over|on top of|higher than",
        "below": "below|under|beneath|underneath|lower than",
    }
    phrases = {f" {p} ": name for name, listed in words.items() for p in listed.split("|")}
    colours = {"scarlet": "red", "turquoise": "cyan", "violet": "purple", "rosy": "pink"}
    checked = 0
    for caption in (c for of_scene in captions["train"] for c in of_scene):
        if len(caption.claims.mentions) != 2 or caption.claims.only:
            continue
        found = [p for p in sorted(phrases, key=len, reverse=True) if p in caption.text]
        if not found or not caption.text.startswith(("a ", "an ")) or any(w in caption.text for w in (" with ", " it")):
            continue
        first, _, second = caption.text.partition(found[0])
        spoken = [next(colours.get(w, w) for w in part.split() if colours.get(w, w) in
                       {m.colour for m in caption.claims.mentions}) for part in (first, second)]  # fmt: skip
        if phrases[found[0]] in ("right", "below"):
            spoken.reverse()
        ((_, i, j),) = caption.claims.relations
        assert spoken == [caption.claims.mentions[i].colour, caption.claims.mentions[j].colour], caption
        checked += 1
    assert checked > 2000


def test_vocabulary_is_small_and_is_the_file_that_ships(repo_root):
    words = scenes_vocabulary()
    assert len(words) == len(set(words)) < 200
    assert tuple(words[:5]) == SPECIAL_TOKENS
    file = repo_root / "lavis_dcd/assets/quickstart/vocab.txt"
    assert file.read_text(encoding="utf-8").splitlines() == words


def test_no_caption_has_an_unknown_token(captions, repo_root):
    from transformers import BertTokenizerFast

    file = repo_root / "lavis_dcd/assets/quickstart/vocab.txt"
    tokenizer = BertTokenizerFast(vocab_file=str(file), do_lower_case=True)
    texts = [caption.text for split in captions.values() for of_scene in split for caption in of_scene]
    ids = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert max(map(len, ids)) <= 32


# -- pictures ------------------------------------------------------------------------------------------------


def _centre(picture: np.ndarray, channel: int) -> tuple[float, float]:
    """(x, y) of what is clearly of one primary colour."""
    rest = [c for c in range(3) if c != channel]
    mask = picture[..., channel].astype(int) - picture[..., rest].max(-1) > 60
    assert mask.any()
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


@pytest.mark.parametrize("layout", [name for name, held in RELATIONS.items() if held])
def test_drawn_relations_hold_by_a_margin(layout):
    things = (Thing("red", "circle", "large"), Thing("green", "square", "small"), Thing("blue", "star", "large"))
    scene = Scene(layout, things[: 2 if layout in ("beside", "stacked") else 3])
    for seed in range(25):
        picture = draw_scene(scene, 64, np.random.default_rng(seed))
        centres = [_centre(picture, channel) for channel in range(len(scene.things))]
        for name, i, j in scene.relations:
            axis = {"left": 0, "above": 1}[name]
            assert centres[j][axis] - centres[i][axis] > 12, (layout, seed)


@pytest.mark.parametrize(("shape", "tilted"), [("circle", False), ("square", True), ("cross", True)])
def test_large_is_clearly_larger_than_small(shape, tilted):
    areas = {}
    for size in ("small", "large"):
        scene = Scene("middle", (Thing("red", shape, size),))
        pictures = [draw_scene(scene, 64, np.random.default_rng(seed)) for seed in range(20)]
        areas[size] = [int((p[..., 0].astype(int) - p[..., 1:].max(-1) > 60).sum()) for p in pictures]
    assert min(areas["large"]) > 2 * max(areas["small"])


def test_pictures_are_uint8_of_the_size_asked_for_and_fully_inside():
    scene = Scene("row", (RED, RED, RED))
    for seed in range(20):
        picture = draw_scene(scene, 48, np.random.default_rng(seed))
        assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
        red = picture[..., 0].astype(int) - picture[..., 1:].max(-1) > 60
        assert not (red[0].any() or red[-1].any() or red[:, 0].any() or red[:, -1].any())


def test_scenes_and_captions_are_the_same_in_every_process(splits, captions):
    """The checkpoint that ships was trained on these very scenes: a change here needs a new teacher."""
    code = (
        "import hashlib, numpy as np\n"
        "from lavis_dcd.datasets.shape_scenes.scenes import make_splits\n"
        "from lavis_dcd.datasets.shape_scenes.captions import SceneIndex, write_captions\n"
        "s = make_splits({'train': 3000, 'val': 300, 'test': 300}, 0)['test']\n"
        "x = SceneIndex(s.scenes)\n"
        "t = [c.text for i, z in enumerate(s.scenes)"
        " for c in write_captions(z, x, 5, np.random.default_rng([0, 13, s.first + i]))]\n"
        "print(hashlib.sha256('\\n'.join(t).encode()).hexdigest())"
    )
    texts = [caption.text for of_scene in captions["test"] for caption in of_scene]
    here = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there == GOLDEN_TEST_CAPTIONS
