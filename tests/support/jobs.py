"""What a finished job must have left."""

from __future__ import annotations

import json
from pathlib import Path


def assert_finished(folder: Path) -> dict[str, dict]:
    """Assert that a job of two steps logged both and wrote its report; return the rows of its table by name."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
