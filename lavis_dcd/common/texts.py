"""Texts of other people's files: their readable characters, and texts, values and sizes as a message shows them."""

from __future__ import annotations

import re

from lavis_dcd.common.secrets import hidden

# Control characters that are no white space, marks of writing direction, and byte order marks inside a text. None is
# a part of a word. Zero-width joiners are not among them: Persian words and many emoji need them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_HALF = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text without control characters and marks of writing direction; white space stays."""
    return _INVISIBLE.sub("", text)


def half_character(text: str) -> str | None:
    """Return the first lone surrogate of a text, which no tokenizer and no file can take; None where there is none."""
    half = _HALF.search(text)
    return half[0] if half else None


def one_line(text: str, longest: int = 400) -> str:
    """Return the text as a message shows it: escaped where it cannot be printed, without the middle if long.

    What came from the environment is named by its variable; half of a value, cut off, could not be recognised later.
    """
    text = hidden(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def cut(text: str, longest: int) -> str:
    """Return the text with an ellipsis in the place of what is beyond ``longest`` characters."""
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def size_in_words(size: float) -> str:
    """Return a number of bytes as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def shown(value: object, longest: int = 80) -> str:
    """Return the value as written in Python, shortened to about ``longest`` characters."""
    return one_line(repr(value), longest)


def memory_in_words(peaks: dict[str, int]) -> str:
    """Return peaks of memory as people read them: "812 MB", or with a GPU "812 MB, on the GPU 1,234 MB"."""
    gpu = f", on the GPU {peaks['gpu_mb']:,} MB" if "gpu_mb" in peaks else ""
    return f"{peaks['host_mb']:,} MB{gpu}"
