"""One batch, several matchers: each reads the pictures and captions as its own processors make them.

Where matchers differ in their inputs, ``image``, ``text_input``, ``candidate_text`` and ``candidate_image`` of the
samples are mappings from a view's name to what that matcher reads; elsewhere they are plain and serve everybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAIN_VIEW = "student"
VIEWED = ("image", "text_input", "candidate_text", "candidate_image")


def view_of(samples: Mapping[str, Any], name: str = MAIN_VIEW) -> dict[str, Any]:
    """``samples`` as the matcher ``name`` reads them: its own view where there is one, else the main one."""
    found = dict(samples)
    for key in VIEWED:
        if isinstance(found.get(key), Mapping):
            found[key] = found[key].get(name, found[key][MAIN_VIEW])
    return found


def has_view(samples: Mapping[str, Any], name: str) -> bool:
    """Whether the matcher ``name`` reads anything of its own."""
    return any(isinstance(samples.get(key), Mapping) and name in samples[key] for key in VIEWED)
