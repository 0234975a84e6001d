"""Scenes of one to three coloured shapes: what is in them, and the families that make them hard to tell apart.

A scene is pure data here; `captions` words it and `drawing` draws it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lavis_dcd.common.errors import UserError

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
PLACES = ("left", "right", "top", "bottom", "middle")

# Layout -> the relations that hold in it, as (relation, row of the first thing, row of the second).
RELATIONS: dict[str, tuple[tuple[str, int, int], ...]] = {
    **dict.fromkeys(PLACES, ()),
    "beside": (("left", 0, 1),),
    "stacked": (("above", 0, 1),),
    "row": (("left", 0, 1), ("left", 0, 2), ("left", 1, 2)),
    "column": (("above", 0, 1), ("above", 0, 2), ("above", 1, 2)),
    "roof": (("above", 0, 1), ("above", 0, 2), ("left", 1, 2)),  # one above two
    "bowl": (("above", 1, 0), ("above", 2, 0), ("left", 1, 2)),  # one below two
}
_LAYOUTS = {1: PLACES, 2: ("beside", "stacked"), 3: ("row", "column", "roof", "bowl")}
_SHARE_OF_COUNT = {1: 0.08, 2: 0.60, 3: 0.32}

FAMILY = ("base", "colour", "shape", "size", "order", "binding")
"""How the members of a family differ from the first: one thing's colour, shape or size; who is where; or which of
two things has which colour (in a scene of one thing: another colour)."""

# There are 480 scenes of one thing, about 18,000 of two, millions of three; beyond this the search takes minutes.
MOST_SCENES = 20_000


@dataclass(frozen=True, order=True)
class Thing:
    """One shape of a scene."""

    colour: str
    shape: str
    size: str


@dataclass(frozen=True, order=True)
class Scene:
    """The things that a scene shows. Equal scenes have the same full description.

    Args:
        layout: a place of `PLACES` for one thing, else a key of `RELATIONS`.
        things: in the layout's order (left to right, top to bottom; the odd one first in "roof" and "bowl").
    """

    layout: str
    things: tuple[Thing, ...]

    @property
    def relations(self) -> tuple[tuple[str, int, int], ...]:
        """("left" | "above", i, j): thing i is left of / above thing j."""
        return RELATIONS[self.layout]


@dataclass(frozen=True)
class SplitScenes:
    """The scenes of one split; `families[i]` numbers the family of `scenes[i]`, `first` is the split's first number
    in the data set."""

    scenes: list[Scene]
    families: list[int]
    first: int

    @property
    def names(self) -> list[str]:
        """ "scene_000012", unique over all splits."""
        return [f"scene_{self.first + i:06d}" for i in range(len(self.scenes))]


def make_splits(counts: Mapping[str, int], seed: int) -> dict[str, SplitScenes]:
    """Draw up the scenes of every split: families whole in one split, no scene twice in the data set.

    The evaluation splits are made first, so that they stay the same whatever the number of training scenes.

    Args:
        counts: scenes per split ("train", "val", "test").
        seed: a number >= 0; the same seed gives the same scenes in every process.

    Raises:
        UserError: more scenes asked for than can be told apart.
    """
    if sum(counts.values()) > MOST_SCENES:
        raise UserError(f"shape_scenes: {sum(counts.values())} scenes asked for, at most {MOST_SCENES} can be drawn")
    order = [split for split in ("test", "val", "train") if split in counts]
    taken: set[Scene] = set()
    result: dict[str, SplitScenes] = {}
    first, family = 0, 0
    for code, split in enumerate(order):
        rng = np.random.default_rng([seed, 11, code])
        scenes, families = [], []
        for members in _families(counts[split], rng, taken):
            scenes += members
            families += [family] * len(members)
            family += 1
        mixed = rng.permutation(len(scenes))
        result[split] = SplitScenes([scenes[i] for i in mixed], [families[i] for i in mixed], first)
        first += len(scenes)
    return {split: result[split] for split in counts}


def _families(count: int, rng: np.random.Generator, taken: set[Scene]) -> Iterator[list[Scene]]:
    while count > 0:
        members = _new_family(rng, taken)[:count]
        taken.update(members)
        count -= len(members)
        yield members


def _new_family(rng: np.random.Generator, taken: set[Scene]) -> list[Scene]:
    size = int(rng.choice(list(_SHARE_OF_COUNT), p=list(_SHARE_OF_COUNT.values())))
    for attempt in range(2_000):
        # Scenes of one thing are few, of two not many: when they run out, go on with three.
        base = _random_scene(3 if attempt >= 500 else size, rng)
        members = [base] + [_sibling(base, kind, rng) for kind in FAMILY[1:]]
        distinct = len(set(members)) == len(members)
        if distinct and not taken.intersection(members) and all(_tellable(m) for m in members):
            return members
    raise UserError("shape_scenes: no further scenes can be told apart; ask for fewer")


def _random_scene(size: int, rng: np.random.Generator) -> Scene:
    layouts = _LAYOUTS[size]
    return Scene(layouts[rng.integers(len(layouts))], tuple(_random_thing(rng) for _ in range(size)))


def _random_thing(rng: np.random.Generator) -> Thing:
    return Thing(*(kinds[rng.integers(len(kinds))] for kinds in (COLOURS, SHAPES, SIZES)))


def _tellable(scene: Scene) -> bool:
    # A mention of colour and shape must always point at one thing of the scene.
    return len({(thing.colour, thing.shape) for thing in scene.things}) == len(scene.things)


def _sibling(base: Scene, kind: str, rng: np.random.Generator) -> Scene:
    things = list(base.things)
    row = int(rng.integers(len(things)))
    if len(things) == 1 and kind in ("order", "binding"):
        if kind == "order":
            return Scene(_other(PLACES, base.layout, rng), base.things)
        kind = "colour"
    if kind in ("order", "binding"):
        other = (row + 1 + int(rng.integers(len(things) - 1))) % len(things)
        one, two = things[row], things[other]
        if kind == "binding":
            one, two = replace(one, colour=two.colour), replace(two, colour=one.colour)
        else:
            one, two = two, one
        things[row], things[other] = one, two
    else:
        kinds = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[kind]
        things[row] = replace(things[row], **{kind: _other(kinds, getattr(things[row], kind), rng)})
    return Scene(base.layout, tuple(things))


def _other(kinds: tuple[str, ...], current: str, rng: np.random.Generator) -> str:
    rest = [kind for kind in kinds if kind != current]
    return rest[rng.integers(len(rest))]
