"""The captions read back word by word, with a grammar of the test's own, against the scenes themselves."""

from __future__ import annotations

import re
from itertools import permutations

import numpy as np
import pytest

from lavis_dcd.datasets.shape_scenes.captions import SceneIndex, write_captions
from lavis_dcd.datasets.shape_scenes.scenes import Scene, make_splits

COLOUR = {"scarlet": "red", "turquoise": "cyan", "violet": "purple", "rosy": "pink"}
SHAPE = {"disc": "circle", "ball": "circle", "box": "square", "plus": "cross", "hoop": "ring"}
SIZE = {"little": "small", "tiny": "small", "big": "large", "huge": "large"}
COLOURS = "red|scarlet|orange|yellow|green|cyan|turquoise|blue|purple|violet|pink|rosy"
SHAPES = "circle|disc|ball|square|box|triangle|star|cross|plus|ring|hoop"
THING = rf"(?:(?P<size>small|little|tiny|large|big|huge) )?(?P<colour>{COLOURS}) (?P<shape>{SHAPES})"
LEFT = r"(?:on the left side of|to the left of|on the left of|left of)"
RIGHT = r"(?:on the right side of|to the right of|on the right of|right of)"
ABOVE, BELOW = r"(?:above|over|on top of|higher than)", r"(?:below|under|beneath|underneath|lower than)"
ITS = {"left": "(?:on|to) its left", "right": "(?:on|to) its right", "above": "(?:above|over|on top of) it",
       "below": "(?:below|under|beneath) it"}  # fmt: skip
REL = {"left": LEFT, "right": RIGHT, "above": ABOVE, "below": BELOW}
WAY = {"left": "from left to right", "right": "from right to left", "above": "from top to bottom",
       "below": "from bottom to top"}  # fmt: skip
PLACES = {"left": "(?:on|at) the left(?: side)?", "right": "(?:on|at) the right(?: side)?",
          "top": "at the top|near the top|in the upper part",
          "bottom": "at the bottom|near the bottom|in the lower part",
          "middle": "in the middle|in the centre|at the center"}  # fmt: skip
END = r", (?:and nothing else|nothing else|just these two)$"


def read(text: str) -> tuple[list[tuple], list[tuple], bool, str | None]:
    """(things as (colour, shape, size or None), relations (name, i, j), whether nothing else is there, place)."""
    things = []

    def take(found: re.Match) -> str:
        colour, shape, size = found["colour"], found["shape"], found["size"]
        things.append((COLOUR.get(colour, colour), SHAPE.get(shape, shape), SIZE.get(size, size)))
        return f"#{len(things) - 1}"

    line = re.sub(r"(?:\ban? )?(?:(?:lone|single) )?" + THING, take, text)
    if len(things) == 1:
        return things, [], True, _place(line)
    if len(things) == 2:
        short = re.sub(END, "", line)
        return things, [_pair(short)], short != line, None
    return things, _three(line), False, None


def _place(line: str) -> str | None:
    assert re.search(r"only|just|nothing but|by itself|all alone|^#0|^a #0", line), line
    return next((name for name, words in PLACES.items() if re.search(words, line)), None)


def _pair(line: str) -> tuple[str, int, int]:
    for name, words in REL.items():
        if found := re.fullmatch(rf"(?:there is )?#(\d) (?:is |sits )?{words} #(\d)", line):
            return _canonical(name, int(found[1]), int(found[2]))
        if found := re.fullmatch(rf"{words} #(\d) (?:is|there is) #(\d)", line):
            return _canonical(name, int(found[2]), int(found[1]))
        if found := re.fullmatch(rf"#(\d)(?: with| has|, and) #(\d) {ITS[name]}", line):
            return _canonical(name, int(found[2]), int(found[1]))
    raise AssertionError(f"no reading of {line!r}")


def _three(line: str) -> list[tuple[str, int, int]]:
    for name, words in WAY.items():
        if re.fullmatch(rf"{words}, #0, #1 and #2|#0, #1 and #2 {words}|#0, then #1, then #2, {words}", line):
            return _chain(name, 0, 1, 2)
        if re.fullmatch(rf"#0 and #1 {words}, #2 (?:{ABOVE}|{BELOW}) (?:them|both)", line):
            return [_canonical(name, 0, 1), *_odd(line, 2, (0, 1))]
    for name, words in REL.items():
        if re.fullmatch(rf"#0 {words} #1, which is {words} #2", line):
            return _chain(name, 0, 1, 2)
        if re.fullmatch(rf"#0 {words} #1 on the left and #2 on the right", line):
            return [_canonical(name, 0, 1), _canonical(name, 0, 2), ("left", 1, 2)]
        if re.fullmatch(rf"#0 {words} #1, with #2 (?:{ABOVE}|{BELOW}) (?:them|both)", line):
            return [_canonical(name, 0, 1), *_odd(line, 2, (0, 1))]
    ends = {"left": ("on the left", "on the right"), "right": ("on the right", "on the left"),
            "above": ("above", "below"), "below": ("below", "above")}  # fmt: skip
    for name, (one, two) in ends.items():
        if line == f"#0 between #1 {one} and #2 {two}":
            return _chain(name, 1, 0, 2)
        if line == f"between #0 {one} and #1 {two} is #2":
            return _chain(name, 0, 2, 1)
    raise AssertionError(f"no reading of {line!r}")


def _odd(line: str, odd: int, pair: tuple[int, int]) -> list[tuple[str, int, int]]:
    name = "above" if re.search(r"(?:above|over) (?:them|both)$", line) else "below"
    return [_canonical(name, odd, other) for other in pair]


def _chain(name: str, *things: int) -> list[tuple[str, int, int]]:
    return [_canonical(name, things[i], things[j]) for i, j in ((0, 1), (0, 2), (1, 2))]


def _canonical(name: str, i: int, j: int) -> tuple[str, int, int]:
    return {"right": ("left", j, i), "below": ("above", j, i)}.get(name, (name, i, j))


def holds(reading: tuple, scene: Scene) -> bool:
    """A plain search of all ways to match what is named with what is there."""
    named, relations, only, place = reading
    if (only and len(scene.things) != len(named)) or place not in (None, scene.layout):
        return False
    for rows in permutations(range(len(scene.things)), len(named)):
        fits = all(
            (colour, shape) == (scene.things[r].colour, scene.things[r].shape) and size in (None, scene.things[r].size)
            for (colour, shape, size), r in zip(named, rows, strict=True)
        )
        if fits and all((name, rows[i], rows[j]) in scene.relations for name, i, j in relations):
            return True
    return False


@pytest.mark.parametrize("seed", [0, 1])
def test_read_back_every_caption_is_true_of_its_own_scene_alone(seed):
    for split in make_splits({"val": 120, "test": 120}, seed).values():
        index, scenes = SceneIndex(split.scenes), split.scenes
        for row, scene in enumerate(scenes):
            for caption in write_captions(scene, index, 5, np.random.default_rng([seed, 13, split.first + row])):
                reading = read(caption.text)
                assert [i for i, other in enumerate(scenes) if holds(reading, other)] == [row], caption.text


def test_the_grammar_tells_falsehoods_from_truths():
    """The reader above is no rubber stamp: mirrored relations are false of the same scene."""
    split = make_splits({"test": 60}, 0)["test"]
    index, checked = SceneIndex(split.scenes), 0
    for row, scene in enumerate(split.scenes):
        for caption in write_captions(scene, index, 5, np.random.default_rng(row)):
            things, relations, only, place = read(caption.text)
            mirrored = [(name, j, i) for name, i, j in relations]
            if relations:
                assert not holds((things, mirrored, only, place), scene)
                checked += 1
    assert checked > 200
