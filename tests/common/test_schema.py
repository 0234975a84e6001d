from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import faults, parse


class Colour(enum.Enum):
    RED = 1


@dataclass
class Head:
    width: int
    rate: float = 0.5


@dataclass
class Model:
    name: str = "x"
    amp: Literal["bf16", "off"] = "bf16"
    layers: list[int] = field(default_factory=list)
    size: tuple[int, int] = (1, 2)
    head: Head | None = None
    tower: Head = field(default_factory=lambda: Head(1))
    heads: list[Head] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)
    anything: Any = None
    colour: Colour = Colour.RED
    path: Path | None = None
    count: int | str | None = None
    flag: bool = False
    old: Optional[float] = None  # noqa: UP045  the older spelling must work too


@dataclass
class Checked:
    k: int = 1

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k {self.k} is below 1")


def test_everything_is_converted():
    got = parse(
        Model,
        OmegaConf.create(
            {
                "name": "${anything}", "amp": False, "layers": [0, "3", 5.0], "size": [3, 4],
                "head": {"width": "7", "rate": "1e-3"}, "heads": [{"width": 2}], "extra": {"a": 1},
                "anything": "free", "colour": "RED", "path": "a/b", "count": "3", "flag": "true", "old": 1,
            }
        ),
    )  # fmt: skip
    assert got == Model(
        name="free", amp="off", layers=[0, 3, 5], size=(3, 4), head=Head(7, 1e-3), heads=[Head(2)],
        extra={"a": 1}, anything="free", colour=Colour.RED, path=Path("a/b"), count="3", flag=True, old=1.0,
    )  # fmt: skip


def test_defaults_and_an_empty_section():
    assert parse(Model, None) == Model()
    assert parse(Model, {"tower": {"width": 1}}) == Model()


def test_all_faults_are_collected_each_on_one_line():
    found = faults(
        Model,
        {
            "nam": 1,
            "amp": "bf61",
            "layers": [1, "x", True],
            "size": [1],
            "head": {"wdth": 1},
            "tower": None,
            "extra": {"a": "b"},
            "flag": 7.5,
            "name": None,
            "heads": 3,
            "count": [1],
        },
        "model",
    )
    joined = "\n".join(found)
    for expected in (
        "model.nam: unknown key; did you mean name",
        "model.amp: 'bf61' is not one of bf16, off; did you mean bf16?",
        "model.layers[1]: 'x' (text) is not an integer",
        "model.layers[2]: True (true or false) is not an integer",
        "model.size: [1] has 1 items, expected 2",
        "model.head.wdth: unknown key; did you mean width",
        "model.head.width: missing; expected an integer",
        "model.tower: None is not a section; expected keys width",
        "model.extra.a: 'b' (text) is not an integer",
        "model.flag: 7.5 (a number) is not true or false",
        "model.name: None (null) is not text",
        "model.heads: 3 (an integer) is not a list of (Head)",
        "model.count: [1] (a list) is not an integer or text or null",
    ):
        assert expected in joined
    assert len(found) == 13
    assert all("\n" not in line for line in found)
    with pytest.raises(UserError) as caught:
        parse(Model, {"nam": 1, "amp": "z"})
    assert len(caught.value.faults) == 2


def test_a_class_may_check_its_own_values():
    assert faults(Checked, {"k": 0}, "run") == ["run: k 0 is below 1"]


def test_an_instance_passes_through():
    assert parse(Model, {"tower": Head(9)}).tower == Head(9)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    )
)
def test_no_value_raises_anything_but_faults(value):
    for name in ("head", "layers", "extra", "size", "count", "amp", "path", "colour"):
        assert isinstance(faults(Model, {name: value}, "m"), list)


@dataclass
class Options:
    depth: int = 2


@dataclass
class Switched:
    options: Options | None = None
    head: Head | None = None


def test_an_optional_section_may_be_switched_on_and_off():
    assert parse(Switched, {"options": True}).options == Options()
    assert parse(Switched, {"options": False}).options is None
    # on, it needs what has no default
    assert faults(Switched, {"head": True}, "model") == ["model.head.width: missing; expected an integer"]
