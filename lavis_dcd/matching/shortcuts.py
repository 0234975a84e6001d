"""Which exact shortcuts a fusion takes: the same scores and gradients for less work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shortcuts:
    """Ways to save work in ``match`` that change no score beyond rounding; a model takes those that fit it.

    With dropout on, what is computed once per item draws its dropout once per item, too.

    Args:
        sdpa: ``scaled_dot_product_attention`` instead of matrices of attention weights.
        first_layer: what the first layer does before picture and text meet is computed once per item, not per pair;
            where a layer reads a picture that no text has changed, its keys and values are made once per picture.
        last_layer: the last layer is computed for the class tokens alone, which are all that the head reads.
        low_rank: attention with few queries or few keys is computed without projecting the long side: the short
            side's projections are multiplied with the other side's weights first.
    """

    sdpa: bool = True
    first_layer: bool = True
    last_layer: bool = True
    low_rank: bool = True

    @classmethod
    def none(cls) -> Shortcuts:
        """The plain path: every layer in full for every pair."""
        return cls(sdpa=False, first_layer=False, last_layer=False, low_rank=False)

    @property
    def any(self) -> bool:
        return self != Shortcuts.none()
