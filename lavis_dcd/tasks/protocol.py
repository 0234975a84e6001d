"""How evaluation sets are scored, as the ``run:`` section has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """How evaluation sets are scored: the keys of ``run:`` that it reads.

    Args:
        k_test: rerank that many per query; ``None`` scores every pair.
        shortlist: name of the matcher whose joint space makes the shortlist; ``None`` or "joint": its own.
        memory_mb: the rows gathered for one call of a matcher.
        eval_memory_mb: features that take more MiB wait on disk, see ``run.eval_memory_mb``.
        coco_1k_folds: add COCO's 1K protocol under the prefix ``1k_``.
        spill_folder: where they wait; no key of ``run:``. The system's temporary folder by default.
    """

    k_test: int | None = None
    shortlist: str | None = None
    batch_size: int = 64
    num_workers: int = 0
    amp: str = "off"
    memory_mb: float = 1024
    eval_memory_mb: float = 4096
    coco_1k_folds: bool = False
    spill_folder: Path | None = None

    @classmethod
    def of_run(cls, run: Any) -> Protocol:
        """From a ``run:`` section, a dataclass or a mapping; what it leaves out has its default."""
        keys = {name: name for name in cls.__dataclass_fields__}
        keys |= {"batch_size": "batch_size_eval", "memory_mb": "match_memory_mb"}
        found = {name: _read(run, key) for name, key in keys.items()}
        given = {name: value for name, value in found.items() if value is not None}
        if given.get("amp") is False:  # LAVIS's own way to say off
            given["amp"] = "off"
        return cls(**given)

    @property
    def how(self) -> str:
        """In words, for tables."""
        if self.k_test is None:
            return "exhaustive"
        return f"shortlist k={self.k_test} ({self.shortlist or 'joint'})"


def _read(run: Any, key: str) -> Any:
    if run is None:
        return None
    return run.get(key) if isinstance(run, Mapping) or hasattr(run, "get") else getattr(run, key, None)
