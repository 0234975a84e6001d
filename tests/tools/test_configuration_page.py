"""The page of settings says what the dataclasses say."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType

import pytest

SOURCE = '''
from dataclasses import dataclass, field
from typing import ClassVar, Literal

START = "here"
Way = Literal["up", "down"]


@dataclass
class Base:
    """A base.

    Args:
        shared, other: of both classes,
            in two lines.
    """

    shared: int = 1
    other: float = 1e-4


@dataclass
class Example(Base):
    """First line of
    the summary.

    Not on the page.
    """

    # the first field's own
    first: str | None = None
    start: str = START  # where it begins
    way: Way = "up"

    # A group
    names: list[str] = field(default_factory=lambda: ["a", "b"])  # behind
    # above, in
    # two lines
    sizes: tuple[float, float] = (0.5, 1.0)
    inner: Base = field(default_factory=Base)
    nothing: dict[str, int] = field(default_factory=dict)
    shown: bool = True
    needed: int
    family: ClassVar[str] = "no setting"
'''


@pytest.fixture(scope="module")
def tool(repo_root) -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_page", repo_root / "tools" / "configuration_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_is_up_to_date(tool):
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run python tools/configuration_page.py"


def test_every_setting_has_a_meaning(tool):
    assert tool.undocumented() == []


def test_fields_and_comments_are_read(tool, tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    section = tool.read_section(tmp_path / "module.py", "Example")
    assert section.summary == "First line of the summary."
    rows = [dataclasses.astuple(setting) for setting in section.settings]
    assert rows == [
        ("shared", "whole number", "`1`", "of both classes, in two lines.", ""),
        ("other", "number", "`0.0001`", "of both classes, in two lines.", ""),
        ("first", "text or null", "`null`", "the first field's own", ""),
        ("start", "text", "`here`", "where it begins", ""),
        ("way", "`up`, `down`", "`up`", "", ""),
        ("names", "list of texts", "`[a, b]`", "behind", "A group"),
        ("sizes", "list of 2 numbers", "`[0.5, 1.0]`", "above, in two lines", "A group"),
        ("inner", "section", tool.A_SECTION, "a section of its own", "A group"),
        ("nothing", "section", "`{}`", "", "A group"),
        ("shown", "true or false", "`true`", "", "A group"),
        ("needed", "whole number", "required", "", "A group"),
    ]


def test_names_of_a_registry_are_listed(tool):
    assert "uniform" in tool._registered("distillation/weighting.py", "WEIGHTINGS")
    assert "in_batch" in tool._registered("distillation/candidates.py", "register_pool")
    with pytest.raises(LookupError, match="adapt CHOICES"):
        tool._registered("distillation/weighting.py", "ABSENT")


def test_a_class_that_has_gone_is_told(tool):
    with pytest.raises(LookupError, match="has no class Absent; adapt PARTS"):
        tool.read_section(tool.PACKAGE / "models" / "towers.py", "Absent")


def test_the_check_writes_nothing(tool, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    monkeypatch.setattr(tool, "PAGE", page)
    assert tool.main(["--check"]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert not page.exists()
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
