"""The plain data sets inside wrappers and concatenations."""

from __future__ import annotations

from typing import Any

from lavis_dcd.common.errors import UserError


def plain_sets(dataset: Any, name: str) -> dict[str, Any]:
    """The plain sets inside wrappers and concatenations, by the names a bank keeps their pictures under."""
    if hasattr(dataset, "datasets"):
        parts = [plain_sets(part, f"{name}.{i}") for i, part in enumerate(dataset.datasets)]
        return {key: leaf for part in parts for key, leaf in part.items()}
    if "dataset" in vars(dataset):
        return plain_sets(dataset.dataset, name)
    return {name: dataset}


def batch_groups(dataset: Any, key: str) -> list[tuple[Any, Any]]:
    """Per row of a training set (value of the annotation's ``key``, picture), wrappers and concatenations included.

    Raises:
        UserError: rows without that key.
    """
    rows = [
        (name, row) for name, leaf in plain_sets(dataset, "").items() for row in getattr(leaf, "annotation", [{}])
    ]  # fmt: skip
    lacking = next((row for _, row in rows if key not in row), None)
    if lacking is not None:
        raise UserError(f"run.batch_by: the rows have no {key!r}; they have {', '.join(lacking) or 'no keys'}")
    return [((name, row[key]), (name, row["image_id"])) for name, row in rows]
