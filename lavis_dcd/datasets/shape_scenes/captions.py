"""Word a scene: five captions in varied English, each with the claims it makes, so that its truth can be checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

from lavis_dcd.datasets.shape_scenes.scenes import Scene, Thing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_COLOUR_WORDS = {
    "red": ("red", "red", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rosy"),
}
_SHAPE_WORDS = {
    "circle": ("circle", "circle", "disc", "ball"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "hoop"),
}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "huge")}
_PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top", "in the upper part"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part"),
    "middle": ("in the middle", "in the centre", "at the center"),
}
_RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}
_ITS_WORDS = {
    "left": ("on its left", "to its left"),
    "right": ("on its right", "to its right"),
    "above": ("above it", "over it", "on top of it"),
    "below": ("below it", "under it", "beneath it"),
}
_THEM_WORDS = {"above": ("above them", "over both"), "below": ("below them", "under both")}
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_DIRECTION_WORDS = {
    "left": "from left to right",
    "right": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}
_ENDS = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("above", "below"),
    "below": ("below", "above"),
}

# {a} {b} {c}: things with their article; {n}: the first without; {rel}: how a stands to b.
_ALONE = (
    "only {a} {place}",
    "just {a} {place}",
    "nothing but {a} {place}",
    "a lone {n} {place}",
    "a single {n} {place}",
    "{place} there is only {a}",
    "{place} , just {a}",
    "{a} by itself {place}",
    "{a} all alone {place}",
)
_PAIR = (
    "{a} {rel} {b}",
    "{a} {rel} {b}",
    "{a} is {rel} {b}",
    "{a} sits {rel} {b}",
    "{rel} {b} is {a}",
    "{rel} {b} there is {a}",
    "there is {a} {rel} {b}",
    "{a} with {b} {its}",
    "{a} has {b} {its}",
    "{a} , and {b} {its}",
)
_ONLY = ("and nothing else", "nothing else", "just these two")
_LINE = (
    "{way} , {a} , {b} and {c}",
    "{a} , {b} and {c} {way}",
    "{a} , then {b} , then {c} , {way}",
    "{a} {rel} {b} , which is {rel} {c}",
    "{b} between {a} {end_a} and {c} {end_c}",
    "between {a} {end_a} and {c} {end_c} is {b}",
)
_ODD = (
    "{a} {rel} {b} on the left and {c} on the right",
    "{b} {left} {c} , with {a} {them}",
    "{c} {right} {b} , with {a} {them}",
    "{b} and {c} from left to right , {a} {them}",
)


@dataclass(frozen=True)
class Mention:
    """A thing as a caption names it; `size` is None where the caption leaves it out."""

    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Claims:
    """The claims of a caption: the things, ("left" | "above", i, j) between them, whether nothing else is there, and,
    perhaps, where a lone thing is."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[str, int, int], ...] = ()
    only: bool = False
    place: str | None = None


@dataclass(frozen=True)
class Caption:
    """The words and what they claim."""

    text: str
    claims: Claims


def is_true(claims: Claims, scene: Scene) -> bool:
    """Return whether the claims hold in the scene, for some way of matching mentions to things."""
    if claims.only and len(scene.things) != len(claims.mentions):
        return False
    if claims.place and scene.layout != claims.place:
        return False
    holds = set(scene.relations)
    for rows in permutations(range(len(scene.things)), len(claims.mentions)):
        fits = all(_fits(m, scene.things[row]) for m, row in zip(claims.mentions, rows, strict=True))
        if fits and all((name, rows[i], rows[j]) in holds for name, i, j in claims.relations):
            return True
    return False


def _fits(mention: Mention, thing: Thing) -> bool:
    same = mention.colour == thing.colour and mention.shape == thing.shape
    return same and mention.size in (None, thing.size)


class SceneIndex:
    """Finds the scenes of which a caption is true, by way of the colours and shapes it names."""

    def __init__(self, scenes: list[Scene]) -> None:
        self._scenes = scenes
        self._having: dict[tuple[str, str], set[int]] = {}
        for row, scene in enumerate(scenes):
            for thing in scene.things:
                self._having.setdefault((thing.colour, thing.shape), set()).add(row)

    def matches(self, claims: Claims) -> list[int]:
        """The rows of the scenes in which `claims` hold, ascending."""
        rows = set.intersection(*(self._having.get((m.colour, m.shape), set()) for m in claims.mentions))
        return sorted(row for row in rows if is_true(claims, self._scenes[row]))


def write_captions(scene: Scene, index: SceneIndex, count: int, rng: np.random.Generator) -> list[Caption]:
    """Different captions of one scene, as brief as its split allows.

    A draft that leaves something out is taken where it is true of this scene only; otherwise more is said. The
    last resort says everything.
    """
    written: dict[str, Caption] = {}
    while len(written) < count:
        for detail, only in ((0.45, False), (0.7, False), (0.85, False), (1.0, False), (1.0, True)):
            caption = _draft(scene, detail, only, rng)
            if caption.text not in written and len(index.matches(caption.claims)) == 1:
                break
        written.setdefault(caption.text, caption)
    return list(written.values())


def _draft(scene: Scene, detail: float, only: bool, rng: np.random.Generator) -> Caption:
    """One caption; `detail` is the chance that a size, a place or a third thing is said, `only` adds to a pair that
    nothing else is there (a scene of three may hold the same pair)."""
    if len(scene.things) == 1:
        return _draft_alone(scene, detail, rng)
    if len(scene.things) == 3 and rng.random() < 0.5 + 0.5 * detail:
        return _draft_three(scene, detail, rng)
    name, i, j = scene.relations[rng.integers(len(scene.relations))]
    caption = _draft_pair(scene.things[i], scene.things[j], name, detail, rng)
    if only and len(scene.things) == 2:
        return Caption(f"{caption.text}, {_pick(_ONLY, rng)}", replace(caption.claims, only=True))
    return caption


def _draft_alone(scene: Scene, detail: float, rng: np.random.Generator) -> Caption:
    mention = _mention(scene.things[0], detail, rng)
    place = scene.layout if rng.random() < 0.3 + 0.7 * detail else None
    noun = _noun(mention, rng)
    words = {"a": _article(noun), "n": noun, "place": _pick(_PLACE_WORDS[place], rng) if place else ""}
    templates = _ALONE if place else tuple(t for t in _ALONE if t.endswith("{place}"))
    return Caption(_fill(_pick(templates, rng), words), Claims((mention,), only=True, place=place))


def _draft_pair(one: Thing, two: Thing, name: str, detail: float, rng: np.random.Generator) -> Caption:
    mentions = (_mention(one, detail, rng), _mention(two, detail, rng))
    nouns = [_article(_noun(mention, rng)) for mention in mentions]
    spoken = name
    if rng.random() < 0.5:
        nouns, spoken = nouns[::-1], _INVERSE[name]
    words = {
        "a": nouns[0],
        "b": nouns[1],
        "rel": _pick(_RELATION_WORDS[spoken], rng),
        "its": _pick(_ITS_WORDS[_INVERSE[spoken]], rng),
    }
    return Caption(_fill(_pick(_PAIR, rng), words), Claims(mentions, ((name, 0, 1),)))


def _draft_three(scene: Scene, detail: float, rng: np.random.Generator) -> Caption:
    mentions = tuple(_mention(thing, detail, rng) for thing in scene.things)
    nouns = [_article(_noun(mention, rng)) for mention in mentions]
    spoken = {"row": "left", "column": "above", "roof": "above", "bowl": "below"}[scene.layout]
    if scene.layout in ("roof", "bowl"):
        words = {
            "rel": _pick(_RELATION_WORDS[spoken], rng),
            "them": _pick(_THEM_WORDS[spoken], rng),
            "left": _pick(_RELATION_WORDS["left"], rng),
            "right": _pick(_RELATION_WORDS["right"], rng),
        }
        template = _pick(_ODD, rng)
    else:
        if rng.random() < 0.5:
            nouns, spoken = nouns[::-1], _INVERSE[spoken]
        words = {
            "rel": _pick(_RELATION_WORDS[spoken], rng),
            "way": _DIRECTION_WORDS[spoken],
            "end_a": _ENDS[spoken][0],
            "end_c": _ENDS[spoken][1],
        }
        template = _pick(_LINE, rng)
    words |= dict(zip("abc", nouns, strict=True))
    return Caption(_fill(template, words), Claims(mentions, scene.relations))


def _mention(thing: Thing, detail: float, rng: np.random.Generator) -> Mention:
    return Mention(thing.colour, thing.shape, thing.size if rng.random() < detail else None)


def _noun(mention: Mention, rng: np.random.Generator) -> str:
    size = [_pick(_SIZE_WORDS[mention.size], rng)] if mention.size else []
    return " ".join([*size, _pick(_COLOUR_WORDS[mention.colour], rng), _pick(_SHAPE_WORDS[mention.shape], rng)])


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def _fill(template: str, words: dict[str, str]) -> str:
    return re.sub(r"\s+", " ", template.format(**words)).strip().replace(" ,", ",")


def scenes_vocabulary() -> list[str]:
    """The BERT WordPiece vocabulary of the captions: the special tokens, then every word in alphabetical order."""
    tables = (_COLOUR_WORDS, _SHAPE_WORDS, _SIZE_WORDS, _PLACE_WORDS, _RELATION_WORDS, _ITS_WORDS, _THEM_WORDS, _ENDS)
    texts = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    texts += [*_DIRECTION_WORDS.values(), *_ALONE, *_PAIR, *_ONLY, *_LINE, *_ODD, "a an"]
    words = {word for text in texts for word in re.sub(r"\{\w+\}", " ", text).split()}
    return [*SPECIAL_TOKENS, *sorted(words)]
