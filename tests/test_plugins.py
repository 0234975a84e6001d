from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_dcd import hook, plugins
from lavis_dcd.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    prelude = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", prelude + code],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_importing_the_package_leaves_lavis_alone_and_then_lists_our_models():
    lines = run_python(
        "import lavis_dcd, lavis_dcd.distillation.losses\n"
        "print('lavis' in sys.modules, len(sys.meta_path))\n"
        "from lavis.models import model_zoo\n"
        "from lavis.datasets.builders import dataset_zoo\n"
        "print(dict(model_zoo)['meter_retrieval'], 'dcd' in dict(model_zoo))\n"
        "print('shape_scenes' in dataset_zoo.get_names())\n"
        "from lavis.common.registry import registry\n"
        "print(registry.list_runners(), registry.get_path('cache_root').endswith('lavis'))\n"
        "print(any('lavis_dcd' in type(f).__module__ for f in sys.meta_path))\n"
    )
    assert lines[0].startswith("False")
    assert "'coco', 'flickr', 'pretrain_288', 'student_coco', 'student_flickr', 'quickstart'" in lines[1]
    assert lines[1].endswith("True") and lines[2] == "True"
    assert "runner_dcd" in lines[3] and lines[3].endswith("True")
    assert lines[4] == "False"


@pytest.fixture
def made_up_host(tmp_path, monkeypatch):
    """A host and a plug-in package of ours in miniature, and the order of what happens to them."""
    order: list[str] = []
    monkeypatch.setattr(hook, "_HOST", "made_up_host")
    monkeypatch.setattr(hook, "_OURS", "made_up_ours.")
    monkeypatch.setattr(hook, "_register", lambda: order.append("registered"))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hook._AfterHost)])
    monkeypatch.setattr(sys, "made_up_order", order, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    note = "import sys; sys.made_up_order.append({!r})\n"
    sources = {
        "made_up_host/__init__.py": note.format("host"),
        "made_up_ours/__init__.py": "",
        "made_up_ours/light.py": note.format("light"),
        "made_up_ours/inner.py": "import made_up_host\n" + note.format("inner"),
        "made_up_ours/outer.py": "import made_up_ours.inner\n" + note.format("outer"),
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    yield order
    for name in [name for name in sys.modules if name.startswith("made_up_")]:
        del sys.modules[name]


def test_registration_follows_the_import_of_the_host(made_up_host):
    hook.install()
    hook.install()
    assert sum(isinstance(finder, hook._AfterHost) for finder in sys.meta_path) == 1
    importlib.import_module("made_up_ours.light")
    assert made_up_host == ["light"]
    importlib.import_module("made_up_host")
    assert made_up_host == ["light", "host", "registered"]
    assert not any(isinstance(finder, hook._AfterHost) for finder in sys.meta_path)
    hook.install()
    assert made_up_host == ["light", "host", "registered", "registered"]


def test_registration_waits_for_the_outermost_of_our_modules(made_up_host):
    hook.install()
    importlib.import_module("made_up_ours.outer")
    assert made_up_host == ["host", "inner", "outer", "registered"]


@pytest.mark.slow
def test_our_task_may_be_the_first_to_import_lavis():
    lines = run_python(
        "import lavis_dcd.tasks.dcd_retrieval\n"
        "from lavis.common.registry import registry\n"
        "print(registry.get_model_class('dcd').__module__)\n"
        "print(registry.get_runner_class('runner_dcd').__module__)\n"
    )
    assert lines == ["lavis_dcd.models.dcd.model", "lavis_dcd.runners.runner_dcd"]


@pytest.mark.slow
def test_a_package_imported_after_lavis_registers_at_once_and_twice_is_harmless():
    lines = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import lavis, lavis_dcd\n"
        "from lavis.common.registry import registry\n"
        "print('dcd' in registry.list_models())\n"
        "from lavis_dcd.plugins import register_all\n"
        "register_all(); lavis_dcd.install(); print(len(registry.list_models()))\n"
    )
    assert lines[0] == "True"


def test_no_module_that_registers_something_is_left_out():
    import lavis  # noqa: F401
    from lavis.common.registry import registry

    found = [
        (kind, name)
        for path in (ROOT / "lavis_dcd").rglob("*.py")
        for kind, name in re.findall(r"^@registry\.register_(\w+)\(\"(\w+)\"\)", path.read_text(), re.MULTILINE)
    ]
    assert {kind for kind, _ in found} == {"model", "task", "runner", "builder", "processor"}
    for kind, name in found:
        assert name in registry.mapping[f"{kind}_name_mapping"], f"lavis_dcd.plugins does not import {name}"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the import path with a sound and a broken plug-in."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sound_plugin.py").write_text(
        "from lavis.common.registry import registry\n"
        "from lavis.tasks.base_task import BaseTask\n"
        "if 'plugged_task' not in registry.list_tasks():\n"
        "    registry.register_task('plugged_task')(type('PluggedTask', (BaseTask,), {}))\n"
    )
    (tmp_path / "broken_plugin.py").write_text("raise ValueError('no such backbone')\n")
    yield tmp_path
    for name in ("sound_plugin", "broken_plugin"):
        sys.modules.pop(name, None)


def test_plugins_are_imported_and_the_broken_ones_named(modules):
    from lavis.common.registry import registry

    plugins.load_plugins(["sound_plugin"])
    assert "plugged_task" in registry.list_tasks()
    with pytest.raises(UserError) as caught:
        plugins.load_plugins(["broken_plugin", "sound_plugin", "no.such.module"])
    assert caught.value.faults == [
        "--plugins: cannot import broken_plugin: ValueError: no such backbone",
        "--plugins: cannot import no.such.module: ModuleNotFoundError: No module named 'no'",
    ]


def test_entry_points_are_loaded_by_group(modules, caplog):
    info = modules / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lavis.plugins]\ngood = sound_plugin\nbad = broken_plugin\n")
    plugins.register_all()
    assert "sound_plugin" in sys.modules
    line = "entry point lavis.plugins: bad: cannot import broken_plugin: ValueError: no such backbone"
    assert line in caplog.text
    with pytest.raises(UserError) as caught:
        plugins.load_plugins([])
    assert caught.value.faults == [line]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys\nsys.exit(0)\n", "SystemExit: it called sys.exit(0)"),
        ("raise SystemExit\n", "SystemExit: it called sys.exit()"),
        ("raise GeneratorExit('no')\n", "GeneratorExit: no"),
        ("def f(): f()\nf()\n", "RecursionError: maximum recursion depth exceeded"),
        ("raise MemoryError\n", "MemoryError: "),
        ("raise ValueError('x' * 10_000)\n", "ValueError: xxx"),
    ],
)
def test_whatever_a_plug_in_raises_is_its_own_fault(modules, code, words):
    (modules / "odd_plugin.py").write_text(code)
    sys.modules.pop("odd_plugin", None)
    importlib.invalidate_caches()
    with pytest.raises(UserError) as caught:
        plugins.load_plugins(["odd_plugin"])
    (line,) = caught.value.faults
    assert line.startswith(f"--plugins: cannot import odd_plugin: {words}") and len(line) < 500


def test_ctrl_c_while_a_plug_in_is_imported_is_ctrl_c(modules):
    (modules / "slow_plugin.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        plugins.load_plugins(["slow_plugin"])
