"""The doors work from a wheel and from an editable install, and uninstalling takes only our files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.install

_HOST = Path(sysconfig.get_paths()["purelib"])
_OURS = ("train.py", "evaluate.py")


class Environment:
    """A virtual environment with a LAVIS of its own; all other packages are the running interpreter's."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = next(folder.glob("lib/python*/site-packages"))
        (self.site / "host.pth").write_text(f"{_HOST}\n")
        # Python looks for lavis.train beside the real lavis/__init__.py, which so must be in this folder.
        ignored = shutil.ignore_patterns("__pycache__", *_OURS)
        shutil.copytree(_HOST / "lavis", self.site / "lavis", ignore=ignored)

    def run(self, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        variables |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run(
            [str(self.python), *args], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
        )

    def pip(self, *args: str, cwd: Path) -> None:
        done = self.run("-m", "pip", *args, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr

    def files(self) -> set[str]:
        found = (p.relative_to(self.site) for p in self.site.rglob("*") if p.is_file())
        return {str(p) for p in found if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("lavis_dcd", "configs", "projects"):
        shutil.copytree(repo_root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "MANIFEST.in"):
        if (repo_root / name).is_file():
            shutil.copy2(repo_root / name, folder / name)
    (folder / "projects" / "dcd" / "probe.yaml").write_text("run: {}\n")
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


_FIND = """
import importlib.util, lavis, lavis_dcd
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.config.job_file import find_config
for name in ("lavis", "lavis.train", "lavis.evaluate", "lavis_dcd"):
    print(importlib.util.find_spec(name).origin)
print(packaged_folder("configs"))
print(find_config("projects/dcd/probe.yaml"))
"""


def _install(environment: Environment, source: Path, *flags: str) -> None:
    environment.pip(
        "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", *flags,
        str(source), cwd=source,
    )  # fmt: skip


def test_a_wheel_install_has_the_doors_and_leaves_nothing_behind(environment, source, tmp_path):
    before = environment.files()
    _install(environment, source)
    site = environment.site
    assert {f"lavis/{name}" for name in _OURS} <= environment.files()

    done = environment.run("-m", "lavis.train", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--cfg-path" in done.stdout and "python -m lavis.train" in done.stdout

    done = environment.run("-c", _FIND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(site / "lavis/__init__.py"), str(site / "lavis/train.py"), str(site / "lavis/evaluate.py"),
        str(site / "lavis_dcd/__init__.py"), str(site / "lavis_dcd/configs"),
        str(site / "lavis_dcd/projects/dcd/probe.yaml"),
    ]  # fmt: skip

    installed = environment.files() - before
    for folder, inside in (("lavis_dcd", ""), ("configs", "configs/"), ("projects", "projects/")):
        for path in (p.relative_to(source / folder) for p in (source / folder).rglob("*") if p.is_file()):
            if path.parts[0] != "launch" and "__pycache__" not in path.parts:
                # the example of a third party's package, and the benchmarks, are for a checkout
                shipped = path.parts[0] not in ("example_plugin", "benchmarks")
                assert (f"lavis_dcd/{inside}{path}" in installed) == shipped, path

    environment.pip("uninstall", "--quiet", "--yes", "lavis-dcd", cwd=tmp_path)
    assert environment.files() == before


def test_an_editable_install_has_the_doors_and_leaves_nothing_behind(environment, source, tmp_path):
    before = environment.files()
    _install(environment, source, "--editable")
    assert not any(name.startswith(("lavis/train", "lavis_dcd/")) for name in environment.files())

    done = environment.run("-m", "lavis.evaluate", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "python -m lavis.evaluate" in done.stdout

    done = environment.run("-c", _FIND, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(environment.site / "lavis/__init__.py"), str(source / "lavis_dcd/launch/train.py"),
        str(source / "lavis_dcd/launch/evaluate.py"), str(source / "lavis_dcd/__init__.py"),
        str(source / "configs"), str(source / "projects/dcd/probe.yaml"),
    ]  # fmt: skip

    environment.pip("uninstall", "--quiet", "--yes", "lavis-dcd", cwd=tmp_path)
    assert environment.files() == before
    assert (environment.site / "lavis/__init__.py").is_file()
