import json

import pytest
import torch
from checkpoints import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_dcd.training.nested_state import flatten, unflatten

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$items"])
nested = st.recursive(
    plain | st.integers(0, 5).map(lambda n: torch.arange(n)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


def through_json(content):
    value, tensors = flatten(content)
    return unflatten(json.loads(json.dumps(value)), tensors)


@settings(max_examples=80, deadline=None)
@given(content=st.dictionaries(keys, nested))
def test_any_nesting_comes_back(content):
    assert_equal(through_json(content), content)


def test_tied_and_overlapping_tensors():
    whole = torch.arange(12.0)
    content = {"a": whole, "b": whole, "part": whole[3:5], "turned": whole.reshape(3, 4).T}
    value, tensors = flatten(content)
    assert sorted(tensors) == ["a", "part", "turned"] and tensors["turned"].is_contiguous()
    assert tensors["part"].untyped_storage().nbytes() == 8
    found = unflatten(value, tensors)
    assert_equal(found, {**content, "turned": content["turned"].contiguous()})
    assert found["a"] is found["b"]


@pytest.mark.parametrize("value", [{1}, object(), b"x", 1j])
def test_other_objects_are_no_state(value):
    with pytest.raises(TypeError, match=f"/model/0 is a {type(value).__name__}; only tensors and plain values"):
        flatten({"model": [value]})


@pytest.mark.parametrize(
    "value", [{"$tensor": "other"}, {"$tensor": ["a"]}, {"$tuple": 3}, {"$items": [[[], 1]]}, {"$items": 5}]
)
def test_what_flatten_never_writes(value):
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        unflatten({"x": value}, {"a": torch.ones(1)})
