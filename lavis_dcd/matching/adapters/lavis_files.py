"""The files that LAVIS's own models fetch by themselves: fetched and checked here before LAVIS looks for them.

LAVIS looks in timm's folder, by the last part of the address alone, and takes whatever lies there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlparse

from lavis.models import clip_vit, eva_vit
from timm.models import hub as timm_hub

from lavis_dcd.common.download import fetch

# LAVIS's code has these addresses inside the functions that build the towers
_BLIP2 = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
BLIP2_TOWERS = {"eva_clip_g": f"{_BLIP2}/eva_vit_g.pth", "clip_L": f"{_BLIP2}/clip_vit_L.pth"}


def cached_by_lavis(url: str) -> Path:
    """Return where LAVIS looks for what is at an address; the folder is made when missing."""
    return Path(timm_hub.get_cache_dir()) / os.path.basename(urlparse(url).path)


def fetched_for_lavis(url: str) -> Path:
    """Return the file at an address, at the place where LAVIS looks for it.

    Raises:
        UserError: it cannot be fetched, or another address's file lies there.
    """
    return fetch(url, cached_by_lavis(url))


@contextmanager
def towers_fetched_here() -> Iterator[None]:
    """Let LAVIS's builders of BLIP-2's towers take the checked file, within the ``with`` block."""

    def fetched(url: str, *_: Any, **__: Any) -> str:
        return str(fetched_for_lavis(url))

    name = "download_cached_file"
    with mock.patch.object(eva_vit, name, fetched), mock.patch.object(clip_vit, name, fetched):
        yield
