"""What the fuzzing of several readers needs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st

Change = Callable[..., Any]


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


def _with(content: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    content = copy.copy(content)
    content[path[0]] = _with(content[path[0]], path[1:], value)
    return content


@pytest.fixture(scope="session")
def with_another_value() -> Change:
    """``with_another_value(content, data, values)``: nested content with a drawn value at a drawn place of it."""

    def change(content: Any, data: st.DataObject, values: st.SearchStrategy) -> Any:
        return _with(content, data.draw(st.sampled_from(_places(content))), data.draw(values))

    return change
