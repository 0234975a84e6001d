"""README and docs hold what they say: commands name jobs and settings that exist, code runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lavis_dcd

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("projects/*/*.md")),
]
TWO_COMMANDS = [
    "python -m pip install -e . && python -m lavis.train --cfg-path projects/dcd/quickstart.yaml",
    'python -m pip install -e ".[test]" && python -m pytest',
]
# tests/test_example_plugin.py runs these, in an environment where that package is installed
PLUGIN = "projects/example_plugin"
TOOLS = {"ruff", "mypy", "lint-imports", "mkdocs", "pre-commit"}
ROOMS = {folder.name for folder in (ROOT / "lavis_dcd").iterdir() if folder.is_dir()}


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _commands(page: Path) -> list[str]:
    """Single commands: lines joined where they end in a backslash, and cut at ``&&``."""
    lines = [line for block in _blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def _named(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in _commands(page)))
JOBS = [command for command in COMMANDS if "--cfg-path" in command and PLUGIN not in command]
WITH_LINKS = [page for page in PAGES if re.search(r"\]\(", page.read_text(encoding="utf-8"))]


# -- commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", JOBS)
def test_commands_name_jobs_and_settings_that_exist(command, tmp_path, monkeypatch):
    import lavis  # noqa: F401

    from lavis_dcd.config.checks import check_sections
    from lavis_dcd.config.job_file import merge_defaults, read_job
    from lavis_dcd.variants import split_off

    (tmp_path / "captions.csv").touch()
    monkeypatch.setenv("OWN_PHOTOS", str(tmp_path))
    words = shlex.split(command)
    options = words[words.index("--options") + 1 :] if "--options" in words else []
    own, _ = split_off(read_job(words[words.index("--cfg-path") + 1], options)[0])
    assert check_sections(merge_defaults(own)).faults == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_start_programs_that_exist(command):
    words = shlex.split(command)
    while words and "=" in words[0]:  # variables before the program
        words.pop(0)
    if words[0] == "export":
        return
    if words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file(), command
    elif words[0] in ("python", "torchrun"):
        module = words[words.index("-m") + 1]
        # LAVIS is not imported to look into it: its two launchers are ours
        name = module.replace("lavis.", "lavis_dcd.launch.") if module.startswith("lavis.") else module
        home = ROOT / (name.replace(".", "/") + ".py")
        assert home.is_file() or importlib.util.find_spec(module), command
    else:
        assert words[0] in TOOLS, command


def test_commands_of_the_example_plugin_are_those_of_its_own_readme():
    tested = _commands(ROOT / PLUGIN / "README.md")
    assert [command for command in COMMANDS if PLUGIN in command and command not in tested] == []


def test_extras_that_are_installed_exist():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    named = {
        extra
        for command in COMMANDS
        for extras in re.findall(r"\.\[([\w,]+)\]", command)
        for extra in extras.split(",")
    }
    assert "test" in named
    assert [extra for extra in named if f'"{extra}": [' not in setup] == []


# -- code --------------------------------------------------------------------------------------------------------


def _run(page: Path, folder: Path, **replaced: str) -> str:
    """Run all of a page's Python blocks one after the other in a fresh interpreter; return what they print."""
    code = "\n".join(_blocks(page, "python"))
    assert code, f"{page} has no Python"
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    script = folder / "page.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_page_with_python_is_run_below():
    assert [page.relative_to(ROOT).as_posix() for page in PAGES if _blocks(page, "python")] == [
        "README.md",
        "docs/extending.md",
    ]


@pytest.mark.slow
def test_the_readme_loads_a_student_and_reads_a_picture(job, tmp_path):
    from PIL import Image

    few = {"shape_scenes": {"build_info": {"scenes": {"train": 30, "val": 12, "test": 12}}}}
    folder = job("quickstart", {"model": {"selection": {"hard_negatives": 3}}, "datasets": few})
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photos" / "dog.jpg")
    printed = _run(README, tmp_path, **{"<job id>": folder.name}).splitlines()
    scenes = [line for line in printed if re.fullmatch(r" *-?\d+\.\d{3}  scene \d+", line)]
    assert len(scenes) == 5
    scores = [float(line.split()[0]) for line in scenes]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_the_backbone_of_the_extending_page_scores_pairs(tmp_path):
    printed = _run(ROOT / "docs" / "extending.md", tmp_path)
    assert len(re.findall(r"-?\d+\.\d+", printed)) == 4  # two pictures with two captions


@pytest.mark.parametrize("page", _named([page for page in PAGES if _blocks(page, "yaml")]))
def test_yaml_of_the_pages_parses(page):
    for block in _blocks(ROOT / page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


# -- pages -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_gives_exactly_two_commands():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert [block.strip() for block in _blocks(README, "bash")] == TWO_COMMANDS


@pytest.mark.parametrize("page", _named(WITH_LINKS))
def test_links_lead_somewhere(page):
    home = (ROOT / page).parent
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path = target.split("#")[0]
        assert path == "" or path.startswith("https://") or (home / path).is_file(), target


@pytest.mark.parametrize("page", _named(PAGES))
def test_files_that_a_page_names_exist(page):
    tops = {"tests", "lavis_dcd", "configs", "projects", "tools", "docs"}
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = []
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text):
        top = name.split("/")[0]
        if top in tops | ROOMS and not any((base / name).exists() for base in (ROOT, ROOT / "lavis_dcd")):
            missing.append(name)
    assert missing == []


def test_every_page_stands_in_the_navigation():
    lines = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in lines] == []


def test_citation_and_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lavis_dcd.__version__
    assert f"\n## [{lavis_dcd.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_hooks_fetch_nothing():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    assert {hook["language"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"system"}
