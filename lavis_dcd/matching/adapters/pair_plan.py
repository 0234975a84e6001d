"""Pairs put into chunks: those of one picture together, pictures with alike numbers of tokens together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ChunkSizes:
    """What a chunk of pairs costs by.

    Args:
        pairs, pictures: how many.
        tokens: of all captions, without padding.
        longest: tokens of the longest caption.
        most: tokens of the captions of the picture with most; ``least``: with fewest.
    """

    pairs: int
    pictures: int
    tokens: int
    longest: int
    most: int
    least: int

    @classmethod
    def of_pair(cls, length: int) -> ChunkSizes:
        return cls(1, 1, length, length, length, length)

    def with_pair(self, length: int) -> ChunkSizes:
        """One more pair of the only picture."""
        tokens = self.tokens + length
        return replace(
            self, pairs=self.pairs + 1, tokens=tokens, longest=max(self.longest, length), most=tokens, least=tokens
        )

    def joined(self, other: ChunkSizes) -> ChunkSizes:
        """Together with another picture's pairs."""
        return ChunkSizes(
            self.pairs + other.pairs,
            self.pictures + other.pictures,
            self.tokens + other.tokens,
            max(self.longest, other.longest),
            max(self.most, other.most),
            min(self.least, other.least),
        )


Fits = Callable[[ChunkSizes], bool]
_Part = tuple[list[int], ChunkSizes]


def plan_chunks(pictures: list[int], lengths: list[int], fits: Fits) -> Iterator[list[int]]:
    """Rows of pairs, chunk by chunk, those of one picture next to each other.

    A picture's pairs stay in one chunk where they fit. Pictures are padded to the one with most tokens, so those of
    a chunk differ by a factor of two at most.

    Args:
        pictures: of each pair.
        lengths: tokens of each pair's caption.
        fits: whether a chunk may be so large; a single pair always may.
    """
    groups: dict[int, list[int]] = {}
    for row, picture in enumerate(pictures):
        groups.setdefault(picture, []).append(row)
    parts = [part for rows in groups.values() for part in _parts(rows, lengths, fits)]
    parts.sort(key=lambda part: -part[1].tokens)
    return (rows for rows, _ in _merged(parts, fits))


def _parts(rows: Iterable[int], lengths: list[int], fits: Fits) -> Iterator[_Part]:
    """One picture's pairs in as few parts as fit."""
    taken: list[int] = []
    sizes = None
    for row in rows:
        larger = ChunkSizes.of_pair(lengths[row]) if sizes is None else sizes.with_pair(lengths[row])
        if taken and not fits(larger):
            yield taken, sizes
            taken, larger = [], ChunkSizes.of_pair(lengths[row])
        taken.append(row)
        sizes = larger
    if taken:
        yield taken, sizes


def _merged(parts: list[_Part], fits: Fits) -> Iterator[_Part]:
    """Neighbours joined while they fit and are alike."""
    taken: list[int] = []
    sizes = None
    for rows, own in parts:
        larger = own if sizes is None else sizes.joined(own)
        if taken and (not fits(larger) or larger.most > 2 * larger.least):
            yield taken, sizes
            taken, larger = [], own
        taken = [*taken, *rows]
        sizes = larger
    if taken:
        yield taken, sizes
