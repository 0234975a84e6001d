"""Fixtures that several rooms share."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Before torch is imported, and whatever the caller exports: one thread per process keeps float sums, hence golden
# values and bit-for-bit comparisons with processes that a test starts, independent of the machine's cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import setuptools  # noqa: F401  replaces distutils, before threads of torch's compiler import the two at the same time
from hypothesis import settings

# a test never fails by the clock: the machine may be busy
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The top of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Photographs, weights and golden values that do not ship with the product; skips without them."""
    folder = Path(os.environ.get("LAVIS_DCD_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (set LAVIS_DCD_SHARED)")
    return folder


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """The module `training/stub_job.py`: model, data, task and `job(folder, **run keys)`."""
    path = ROOT / "tests" / "training" / "stub_job.py"
    spec = importlib.util.spec_from_file_location("runner_stub_job", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def permissions_count() -> Iterator[None]:
    """While the test runs, files' permissions hold for root, too: Linux's two capabilities to pass them by are off."""
    if os.geteuid():
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    now = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    if libc.capget(header, now):
        pytest.skip("root may read and write everything, and this system cannot take that away")
    before = now[0]
    now[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, now)
    try:
        yield
    finally:
        now[0] = before
        libc.capset(header, now)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache root for this test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LAVIS_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No address but the loopback can be resolved."""
    import socket

    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        if host in ("localhost", "127.0.0.1"):
            return real(host, *args, **kwargs)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


# -- jobs on a dozen pictures ------------------------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 210), "grey": (130, 130, 130)}
SHAPES = ("square", "bar", "stripe")
CAPTIONS = ("a {} {}", "there is one {} {} on white")

# what every job is given: two steps on a CPU
RUN = {
    "device": "cpu", "max_epoch": 1, "max_steps": 2, "batch_size_train": 4, "batch_size_eval": 8, "num_workers": 0,
    "amp": "off", "log_freq": 1, "job_id": "tiny",
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> list[dict]:
    """Twelve pictures on disk, in ``tmp_path / "photos"``, with two captions each."""
    import numpy as np
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    found = []
    for colour, rgb in COLOURS.items():
        for number, shape in enumerate(SHAPES):
            pixels = np.full((40, 60, 3), 255, dtype=np.uint8)
            pixels[8 : 32 - 8 * number, 5 : 25 + 15 * number] = rgb
            name = f"{colour}_{shape}.png"
            Image.fromarray(pixels).save(folder / name)
            found.append({"image": name, "caption": [text.format(colour, shape) for text in CAPTIONS]})
    return found


@pytest.fixture
def words(pictures: list[dict]) -> list[str]:
    """What the captions of ``pictures`` are made of."""
    return sorted({word for row in pictures for caption in row["caption"] for word in caption.split()})


@pytest.fixture
def vocabulary(tmp_path: Path, words: list[str]) -> str:
    """BERT's kind of vocabulary, of the pictures' captions."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return str(folder / "vocab.txt")


@pytest.fixture
def retrieval_files(pictures: list[dict], tmp_path: Path) -> dict[str, Any]:
    """The ``build_info`` of LAVIS's retrieval builders for ``pictures``: 8 to train on, 2 val, 2 test."""
    files = {}
    for split, chosen in (("train", pictures[:8]), ("val", pictures[8:10]), ("test", pictures[10:])):
        rows = chosen
        if split == "train":  # LAVIS's training rows: one caption each
            rows = [
                {"image": row["image"], "caption": caption, "image_id": row["image"]}
                for row in chosen for caption in row["caption"]
            ]  # fmt: skip
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps(rows))
        files[split] = {"url": str(file), "storage": str(file)}
    return {"annotations": files, "images": {"storage": str(tmp_path / "photos")}}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[[str, dict], Path]:
    """Trains a packaged job with nested settings as --options; returns its run folder."""
    from lavis_dcd import train

    monkeypatch.chdir(tmp_path)

    def run(name: str, settings: dict) -> Path:
        options = [*_dotted({"run": RUN}), *_dotted(settings)]
        assert train.main(["--cfg-path", f"projects/dcd/{name}.yaml", "--options", *options]) == 0
        return tmp_path / "output" / name / "tiny"

    return run


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[[dict], Path]:
    """Trains a job of these sections, ``run`` over ``RUN``; returns its run folder, or raises what was wrong."""
    from lavis_dcd.job import run_job

    monkeypatch.chdir(tmp_path)

    def run(sections: dict) -> Path:
        content = {**sections, "run": {**RUN, **sections.get("run", {})}}
        (tmp_path / "job.yaml").write_text(json.dumps(content))  # JSON is YAML
        run_job("job.yaml", (), (), evaluate=False)
        return tmp_path / "output" / "job" / "tiny"

    return run


def _dotted(settings: dict, path: str = "") -> list[str]:
    items = []
    for key, value in settings.items():
        where = f"{path}{key}"
        items += _dotted(value, f"{where}.") if isinstance(value, dict) else [f"{where}={json.dumps(value)}"]
    return items
